//! The fork gate: the last field of /proc/loadavg is the PID given out last in our PID namespace. One small read tells
//! whether a task was created since the last one, and how many.
//!
//! What is counted are PIDs given out: processes and threads alike, also those of a fork that failed later on. PIDs are
//! given out in a circle: after the largest comes 300, and those in use are skipped, so that the count over the one tick
//! in which the circle closes is an upper bound. Everywhere else it is exact.

/// Where the kernel starts again after the largest PID.
const FIRST_AFTER_WRAP: u32 = 300;

/// No kernel gives out a larger PID.
const PID_MAX_LIMIT: u32 = 1 << 22;

/// Tells what was created between two readings.
#[derive(Clone, Debug)]
pub struct Gate {
    last: u32,
    pid_max: u32,
}

/// PIDs given out between two readings: those after `after` up to `upto`, in a circle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    after: u32,
    upto: u32,
    pid_max: u32,
}

impl Gate {
    /// A gate that has just read `last`, where PIDs are below `pid_max`.
    pub fn new(last: u32, pid_max: u32) -> Gate {
        Gate { last: last.min(PID_MAX_LIMIT), pid_max: pid_max.clamp(FIRST_AFTER_WRAP + 1, PID_MAX_LIMIT) }
    }

    /// What was created when `now` is read; `None` if nothing was.
    pub fn step(&mut self, now: u32) -> Option<Created> {
        let now = now.min(PID_MAX_LIMIT);
        // Somebody may have raised the limit since it was read.
        self.pid_max = self.pid_max.max(now + 1);
        let created = Created { after: self.last, upto: now, pid_max: self.pid_max };
        self.last = now;
        (created.after != created.upto).then_some(created)
    }
}

impl Created {
    /// How many.
    pub fn count(&self) -> u32 {
        if self.upto > self.after {
            self.upto - self.after
        } else {
            (self.pid_max - 1).saturating_sub(self.after) + (self.upto + 1).saturating_sub(FIRST_AFTER_WRAP)
        }
    }

    /// Whether `pid` is one of them.
    pub fn contains(&self, pid: i32) -> bool {
        let Ok(pid) = u32::try_from(pid) else { return false };
        if self.upto > self.after {
            pid > self.after && pid <= self.upto
        } else {
            pid > self.after || (pid <= self.upto && pid >= FIRST_AFTER_WRAP)
        }
    }

    /// All of them, oldest first.
    pub fn pids(&self) -> impl Iterator<Item = i32> + use<> {
        let wrapped = self.upto <= self.after;
        let first = self.after + 1..if wrapped { self.pid_max } else { self.upto + 1 };
        let second = if wrapped { FIRST_AFTER_WRAP..self.upto + 1 } else { 0..0 };
        first.chain(second).filter_map(|pid| i32::try_from(pid).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_created_is_counted_across_the_end_of_the_circle() {
        let rows: [(u32, u32, u32, &[i32]); 5] = [
            (7, 7, 0, &[]),
            (7, 10, 3, &[8, 9, 10]),
            (32766, 300, 2, &[32767, 300]),
            (32767, 301, 2, &[300, 301]),
            (32765, 301, 4, &[32766, 32767, 300, 301]),
        ];
        for (before, now, count, pids) in rows {
            let created = Gate::new(before, 32768).step(now);
            assert_eq!(created.map_or(0, |c| c.count()), count, "{before} to {now}");
            let listed: Vec<i32> = created.map(|c| c.pids().collect()).unwrap_or_default();
            assert_eq!(listed, pids, "{before} to {now}");
            assert!(listed.iter().all(|p| created.unwrap().contains(*p)));
            assert!(!created.is_some_and(|c| c.contains(5) || c.contains(1000) || c.contains(-1)));
        }
    }

    #[test]
    fn the_gate_steps_on_and_survives_nonsense() {
        let mut gate = Gate::new(7, 0);
        assert!(gate.step(9).is_some() && gate.step(9).is_none());
        assert_eq!(gate.step(u32::MAX).map(|c| c.pids().take(3).count()), Some(3));
        assert!(gate.step(1).is_some_and(|c| c.count() == 0 && c.pids().next().is_none()));
    }
}
