//! Real servers that a test starts for itself: processes on an address of their own, in a folder of their own, and gone
//! when the test ends, however it ends.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, Uid};

use crate::interrupt::poll;

/// Until a server accepts, Java's included, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nobody's user and group, for servers that refuse to run as root.
const NOBODY: u32 = 65_534;

/// A loopback address of the caller's own, for what listens in a test.
///
/// 127.0.0.1 is everybody's: the port of a listener that has ended is soon handed to another test's, and who still knocks
/// for the old one, like an agent whose collector has stopped, is then counted there. Here he finds nobody.
pub fn own_ip() -> Ipv4Addr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // Of 127.16.0.0/12 each process has 1024, which no other has unless 1024 processes were started in between.
    let number = std::process::id() << 10 | NEXT.fetch_add(1, Relaxed) & 0x3ff;
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 16, 0, 0).to_bits() | number & 0xf_ffff)
}

/// A free TCP address for a server that has to be told one: on an address of its own its port is still free when the
/// server comes to bind it, for the kernel hands ports of 127.0.0.1 to every connection that goes out in the meantime.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((own_ip(), 0)).context("looking for a free port")?.local_addr()?)
}

/// A running server.
#[derive(Debug)]
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
    log: PathBuf,
}

impl Service {
    /// Starts `command`, and waits until it accepts at `address`. What it says goes to a file in `dir`.
    pub fn start(mut command: Command, dir: &Path, address: SocketAddr) -> Result<Service> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        let mut service = Service { address, child, log };
        let accepts = poll(PATIENCE, Duration::from_millis(20), || service.look())?;
        match accepts {
            Some(true) => Ok(service),
            Some(false) => bail!("{name} ended at once:\n{}", service.said()),
            None => bail!("{name} does not accept at {address} after {PATIENCE:?}:\n{}", service.said()),
        }
    }

    /// Whether it accepts; `None` while that is open.
    fn look(&mut self) -> Option<bool> {
        if TcpStream::connect_timeout(&self.address, Duration::from_secs(1)).is_ok() {
            return Some(true);
        }
        matches!(self.child.try_wait(), Ok(Some(_))).then_some(false)
    }

    /// What it said so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Its children with it; it may be gone already.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Makes `command` run as nobody where we are root, and gives it `dir`: there are servers that refuse to run as root.
pub fn not_as_root(command: &mut Command, dir: &Path) -> Result<()> {
    if Uid::effective().is_root() {
        command.uid(NOBODY).gid(NOBODY);
        chown(dir, Some(NOBODY), Some(NOBODY)).with_context(|| format!("giving {} away", dir.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_ends_at_once_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo the port is taken >&2; exit 1"]);
        let error = Service::start(command, dir.path(), free_address().unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("the port is taken"), "{error:#}");
    }

    #[test]
    fn addresses_differ_and_are_free() {
        let (one, two) = (free_address().unwrap(), free_address().unwrap());
        assert_ne!(one.ip(), two.ip());
        assert!(one.ip().is_loopback() && one.ip() != Ipv4Addr::LOCALHOST && TcpListener::bind(one).is_ok());
    }
}
