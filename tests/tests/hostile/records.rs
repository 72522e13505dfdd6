//! After the handshake: floods that cost the other side more than the sender, renegotiation, and a cut that must not
//! look like an end.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use sidewarden_agent::proxy::pump::{Early, Progress, advance};
use sidewarden_agent::proxy::record::{HEADER, Opened, Records, SLOT};
use sidewarden_proto::traffic::{Secrets, ToWhoHears, hear};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::gate::{BOTH, Gate, LIMIT, dial_from, elsewhere, name, says, trusting};

/// An authenticated client that makes its records itself.
struct Client {
    stream: TcpStream,
    records: Records,
    heard: Vec<u8>,
}

impl Client {
    async fn enter(gate: &Gate) -> Client {
        let mut config = trusting(&gate.web(), &BOTH[..1]);
        config.enable_secret_extraction = true;
        config.key_log = Arc::new(ToWhoHears);
        let mut connection = UnbufferedClientConnection::new(Arc::new(config), name()).unwrap();
        let mut stream = dial_from(elsewhere(), gate.address()).await;
        let (mut heard, mut output, mut early) = (Vec::new(), Vec::new(), Early::default());
        let mut secrets = Secrets::default();
        loop {
            let (progress, told) = hear(|| advance(&mut connection, &mut heard, &mut output, &mut early));
            secrets.add(told);
            stream.write_all(&output).await.unwrap();
            output.clear();
            if progress.unwrap() == Progress::Done {
                return Client { stream, records: Records::of_client(connection, secrets).unwrap(), heard };
            }
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0, "it closed within the handshake");
        }
    }

    /// A record of `data`, sealed.
    fn sealed(&mut self, data: &[u8]) -> Vec<u8> {
        let mut slot = vec![0; SLOT];
        slot[HEADER..HEADER + data.len()].copy_from_slice(data);
        let length = self.records.seal(&mut slot, data.len()).unwrap();
        slot.truncate(length);
        slot
    }

    fn key_update(&mut self) -> Vec<u8> {
        let mut slot = vec![0; 64];
        let length = self.records.seal_key_update(&mut slot).unwrap();
        slot.truncate(length);
        slot
    }

    /// The next data that comes; an error when the connection ends.
    async fn hear(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.records.open(&mut self.heard).map_err(io::Error::other)? {
                Opened::Partial => {
                    let read =
                        timeout(LIMIT, self.stream.read_buf(&mut self.heard)).await.expect("an answer in time")?;
                    if read == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Opened::Control { consumed } => drop(self.heard.drain(..consumed)),
                Opened::Close { .. } => return Err(io::ErrorKind::ConnectionAborted.into()),
                Opened::Data { consumed, plain } => {
                    let data = self.heard[plain].to_vec();
                    self.heard.drain(..consumed);
                    return Ok(data);
                }
            }
        }
    }
}

/// A workload that says of each of its connections whether it ended in order.
async fn witness() -> (std::net::SocketAddr, tokio::sync::mpsc::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut word = [0; 5];
            socket.read_exact(&mut word).await.unwrap();
            socket.write_all(&word).await.unwrap();
            tell.send(matches!(socket.read(&mut word).await, Ok(0))).await.unwrap();
        }
    });
    (address, told)
}

/// A FIN without close_notify could be anybody's on the way: what the workload got may be half of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_fin_is_an_end_to_the_workload_only_after_close_notify() {
    let (workload, mut told) = witness().await;
    let gate = Gate::before(workload, "").await;
    for versions in [&BOTH[..1], &BOTH[1..]] {
        for in_order in [true, false] {
            let tcp = dial_from(elsewhere(), gate.address()).await;
            let connector = TlsConnector::from(Arc::new(trusting(&gate.web(), versions)));
            let mut stream = connector.connect(name(), tcp).await.unwrap();
            says(&mut stream, b"hello").await.unwrap();
            if in_order {
                stream.shutdown().await.unwrap();
            }
            drop(stream);
            assert_eq!(timeout(LIMIT, told.recv()).await.unwrap(), Some(in_order), "{:?}", versions[0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_empty_records_and_key_updates_are_fine_and_a_flood_is_the_end() {
    let gate = Gate::open().await;
    for flood in ["empty records", "key updates"] {
        let mut client = Client::enter(&gate).await;
        // The agent has taken the keys over once it answers: until then they may not be changed.
        let hello = client.sealed(b"hello");
        client.stream.write_all(&hello).await.unwrap();
        assert_eq!(client.hear().await.unwrap(), b"hello");
        let junk =
            |client: &mut Client| if flood == "empty records" { client.sealed(&[]) } else { client.key_update() };
        for _ in 0..20 {
            let mut bytes: Vec<u8> = (0..10).flat_map(|_| junk(&mut client)).collect();
            bytes.extend(client.sealed(b"still here"));
            client.stream.write_all(&bytes).await.unwrap();
            assert_eq!(client.hear().await.unwrap(), b"still here", "{flood}");
        }
        let bytes: Vec<u8> = (0..1_000).flat_map(|_| junk(&mut client)).collect();
        // It may be cut before we have said it all.
        let _ = client.stream.write_all(&bytes).await;
        assert!(client.hear().await.is_err(), "{flood}");
    }
    gate.is_open().await;
}

/// Bytes that are no record, a changed record, a record too long: the workload sees a reset and none of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_open_ends_the_connection() {
    let gate = Gate::open().await;
    for broken in ["garbage", "changed", "repeated", "too long", "in the open"] {
        let mut client = Client::enter(&gate).await;
        let good = client.sealed(b"good");
        client.stream.write_all(&good).await.unwrap();
        assert_eq!(client.hear().await.unwrap(), b"good");
        let mut bytes = client.sealed(b"bad");
        match broken {
            "garbage" => bytes = vec![0xff; 64],
            "changed" => bytes[HEADER] ^= 1,
            "repeated" => bytes = good,
            "too long" => bytes = [&[23, 3, 3, 0x48, 0][..], &[0; 0x4800]].concat(),
            _ => bytes = b"\x16\x03\x03\x00\x04\x01\x00\x00\x00".to_vec(),
        }
        client.stream.write_all(&bytes).await.unwrap();
        assert!(client.hear().await.is_err(), "{broken}");
    }
    gate.is_open().await;
}
