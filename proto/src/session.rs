//! Both halves of the session between agent and collector, without sockets and without a clock.
//!
//! One ordered stream of links goes up, one of acknowledgements and directives comes down. The halves trust the
//! transport for nothing: a link may be lost, come twice or too late, a connection may be cut anywhere, either side may
//! restart. Every link is committed exactly once and in order, because the receiver takes nothing but the next one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::batch::{Cursor, Epoch, Fit, Link};
use crate::wire::{Frame, Hello, Refuse, Welcome};

/// Most bytes of links under way without an acknowledgement.
const WINDOW_BYTES: usize = 8 << 20;
/// Most links under way without an acknowledgement.
const WINDOW_LINKS: usize = 64;
/// With links under way and no progress for this long, they are sent again.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);
/// After this many heartbeats without any frame the other side is gone.
const SILENT_HEARTBEATS: u32 = 3;

/// Why a session cannot go on. The driver closes the connection and comes back later.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SessionError {
    /// The other side said nothing for too long.
    #[error("the other side has been silent for {0:?}")]
    Silent(Duration),
    /// A frame that has no place here.
    #[error("a frame that does not belong here: {0}")]
    Unexpected(&'static str),
    /// The collector refused.
    #[error("refused: {reason}: {detail}", reason = .0.reason, detail = .0.detail)]
    Refused(Refuse),
    /// The links do not form one chain.
    #[error("the chain of events is broken after {after}: history was changed on one side")]
    ChainBroken {
        /// The last sequence number that fits.
        after: u64,
    },
}

/// What the agent's half hands to its driver.
#[derive(Clone, Debug, PartialEq)]
pub enum FromCollector {
    /// The session stands; links go from here on, and everything before is on the collector's disk.
    Welcomed(Welcome),
    /// Everything up to here is on the collector's disk.
    Acked(Cursor),
    /// A signed directive.
    Directive(Vec<u8>),
    /// The answer to a certificate request.
    Renewed(Vec<u8>),
}

/// The agent's half.
#[derive(Debug)]
pub struct Sender {
    heartbeat: Duration,
    welcomed: bool,
    acked: Cursor,
    /// Where the next link must follow.
    at: Cursor,
    /// Links under way: last sequence number and size.
    under_way: VecDeque<(u64, usize)>,
    progress_at: Instant,
    heard_at: Instant,
    spoke_at: Instant,
}

impl Sender {
    /// A session that begins now; the frame is the first to send.
    pub fn new(hello: Hello, now: Instant) -> (Sender, Frame) {
        let sender = Sender {
            heartbeat: Duration::from_secs(u64::from(hello.heartbeat_secs.max(1))),
            welcomed: false,
            acked: Cursor::START,
            at: Cursor::START,
            under_way: VecDeque::new(),
            progress_at: now,
            heard_at: now,
            spoke_at: now,
        };
        (sender, Frame::Hello(hello))
    }

    /// Takes a frame that came from the collector.
    pub fn handle(&mut self, frame: Frame, now: Instant) -> Result<Option<FromCollector>, SessionError> {
        // Without a welcome nothing can be sent, so nothing else counts as a sign of life.
        if self.welcomed {
            self.heard_at = now;
        }
        match frame {
            Frame::Welcome(welcome) => {
                (self.welcomed, self.heard_at) = (true, now);
                self.restart_from(welcome.cursor, now);
                Ok(Some(FromCollector::Welcomed(welcome)))
            }
            Frame::Ack(cursor) => Ok(self.acknowledge(cursor, now)),
            Frame::Rewind(cursor) => {
                self.rewind(cursor);
                Ok(None)
            }
            Frame::Directive(bytes) => Ok(Some(FromCollector::Directive(bytes))),
            Frame::Renewed(answer) => Ok(Some(FromCollector::Renewed(answer))),
            Frame::Refuse(refuse) => Err(SessionError::Refused(refuse)),
            _ => Err(SessionError::Unexpected("the collector sent what only an agent sends")),
        }
    }

    fn restart_from(&mut self, cursor: Cursor, now: Instant) {
        self.acked = cursor;
        self.at = cursor;
        self.under_way.clear();
        self.progress_at = now;
    }

    /// Goes back to where the collector misses something. It has taken everything before, though not yet to disk.
    fn rewind(&mut self, cursor: Cursor) {
        if cursor.seq < self.acked.seq || cursor.seq > self.at.seq {
            return;
        }
        self.at = cursor;
        self.under_way.retain(|(last, _)| *last <= cursor.seq);
    }

    fn acknowledge(&mut self, cursor: Cursor, now: Instant) -> Option<FromCollector> {
        if cursor.seq <= self.acked.seq {
            return None;
        }
        self.acked = cursor;
        self.progress_at = now;
        while self.under_way.front().is_some_and(|(last, _)| *last <= cursor.seq) {
            self.under_way.pop_front();
        }
        if self.at.seq < cursor.seq {
            self.at = cursor;
        }
        Some(FromCollector::Acked(cursor))
    }

    /// After which link the next one is wanted; `None` while the window is shut.
    pub fn wants_after(&self) -> Option<Cursor> {
        let bytes: usize = self.under_way.iter().map(|(_, size)| size).sum();
        let open = self.welcomed && self.under_way.len() < WINDOW_LINKS && bytes < WINDOW_BYTES;
        open.then_some(self.at)
    }

    /// The frame for `link`, which must be the one after [`Sender::wants_after`].
    pub fn send(&mut self, link: Link, now: Instant) -> Frame {
        if self.under_way.is_empty() {
            self.progress_at = now;
        }
        self.at = Cursor { seq: link.last_seq(), hash: link.hash() };
        let frame = Frame::Link(link);
        let size = if let Frame::Link(Link::Batch(batch)) = &frame { batch.body.len() + 128 } else { 128 };
        self.under_way.push_back((self.at.seq, size));
        self.spoke_at = now;
        frame
    }

    /// When [`Sender::handle_timeout`] wants to be called next.
    pub fn timeout(&self) -> Instant {
        let silent = self.heard_at + self.heartbeat * SILENT_HEARTBEATS;
        let mut next = silent.min(self.spoke_at + self.heartbeat);
        if !self.under_way.is_empty() {
            next = next.min(self.progress_at + ACK_TIMEOUT);
        }
        next
    }

    /// Does what is due: a ping to send, or the links under way once more, or the end.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<Option<Frame>, SessionError> {
        let silence = now.duration_since(self.heard_at);
        if silence >= self.heartbeat * SILENT_HEARTBEATS {
            return Err(SessionError::Silent(silence));
        }
        if !self.under_way.is_empty() && now.duration_since(self.progress_at) >= ACK_TIMEOUT {
            self.restart_from(self.acked, now);
        }
        if now.duration_since(self.spoke_at) < self.heartbeat {
            return Ok(None);
        }
        self.spoke_at = now;
        Ok(Some(Frame::Ping))
    }

    /// Whether everything that was sent is acknowledged.
    pub fn is_settled(&self) -> bool {
        self.under_way.is_empty()
    }
}

/// What the collector's half hands to its driver.
#[derive(Clone, Debug, PartialEq)]
pub enum FromAgent {
    /// Commit this link, then call [`Receiver::committed`].
    Commit(Link),
    /// Send this frame.
    Reply(Frame),
    /// A certificate request.
    Renew(Vec<u8>),
    /// The agent runs this directive version.
    DirectiveApplied(u64),
    /// The agent ends, for this reason.
    Bye(String),
}

/// The collector's half.
#[derive(Debug)]
pub struct Receiver {
    epoch: Epoch,
    /// Up to where links were handed to the driver.
    taken: Cursor,
    /// Up to where the driver said they are on disk.
    committed: Cursor,
    /// One `Rewind` for one gap: the link that follows it was sent before the agent could know.
    rewound: bool,
    silent_after: Duration,
    heard_at: Instant,
}

impl Receiver {
    /// Answers `hello`; `cursor` is how far this agent's epoch is on disk.
    pub fn new(hello: &Hello, cursor: Cursor, version: &str, now: Instant) -> (Receiver, Frame) {
        let heartbeat = Duration::from_secs(u64::from(hello.heartbeat_secs.clamp(1, 3600)));
        let receiver = Receiver {
            epoch: hello.epoch,
            taken: cursor,
            committed: cursor,
            rewound: false,
            silent_after: heartbeat * SILENT_HEARTBEATS,
            heard_at: now,
        };
        (receiver, Frame::Welcome(Welcome { version: version.to_owned(), cursor, keeps_gates: true }))
    }

    /// Takes a frame that came from the agent.
    pub fn handle(&mut self, frame: Frame, now: Instant) -> Result<Option<FromAgent>, SessionError> {
        self.heard_at = now;
        match frame {
            Frame::Link(link) => self.take(link),
            Frame::Ping => Ok(Some(FromAgent::Reply(Frame::Ack(self.committed)))),
            Frame::DirectiveApplied(version) => Ok(Some(FromAgent::DirectiveApplied(version))),
            Frame::Renew(csr) => Ok(Some(FromAgent::Renew(csr))),
            Frame::Bye(reason) => Ok(Some(FromAgent::Bye(reason))),
            Frame::Hello(_) => Err(SessionError::Unexpected("a second hello")),
            _ => Err(SessionError::Unexpected("the agent sent what only a collector sends")),
        }
    }

    fn take(&mut self, link: Link) -> Result<Option<FromAgent>, SessionError> {
        if link.epoch() != self.epoch {
            return Err(SessionError::Unexpected("a link of another epoch than the hello's"));
        }
        match self.taken.fit(link) {
            Fit::Next(link, after) => {
                self.taken = after;
                self.rewound = false;
                Ok(Some(FromAgent::Commit(link)))
            }
            Fit::Known => Ok(Some(FromAgent::Reply(Frame::Ack(self.committed)))),
            Fit::Gap if self.rewound => Ok(None),
            Fit::Gap => {
                self.rewound = true;
                Ok(Some(FromAgent::Reply(Frame::Rewind(self.taken))))
            }
            Fit::Broken => Err(SessionError::ChainBroken { after: self.taken.seq }),
        }
    }

    /// The driver has everything up to `cursor` on disk; returns the frame that says so.
    pub fn committed(&mut self, cursor: Cursor) -> Frame {
        if cursor.seq > self.committed.seq {
            self.committed = cursor;
        }
        Frame::Ack(self.committed)
    }

    /// When the agent counts as gone unless it speaks before.
    pub fn timeout(&self) -> Instant {
        self.heard_at + self.silent_after
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, LossReason, Tombstone};
    use crate::event::{AgentStopping, Body, Event, Severity};
    use crate::identity::Sha256;
    use crate::time::Timestamp;

    const EPOCH: Epoch = Epoch([9; 16]);

    /// A small generator of our own: the seed in a failure's message is all that is needed to see it again.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % sides
        }
    }

    /// The agent's disk: links not yet acknowledged.
    #[derive(Default)]
    struct Spool {
        links: VecDeque<Link>,
        last: u64,
        hash: Option<Sha256>,
    }

    impl Spool {
        fn append(&mut self, count: usize) {
            let body = Body::from(AgentStopping { reason: "x".into() });
            let mut events: Vec<Event> =
                (0..count).map(|_| Event::new(Timestamp(1), Severity::Info, "x", &body)).collect();
            let prev = self.hash.unwrap_or(Sha256::ZERO);
            let batch = Batch::seal(EPOCH, self.last + 1, prev, &mut events).unwrap();
            self.last += count as u64;
            self.hash = Some(batch.hash);
            self.links.push_back(Link::Batch(batch));
        }

        /// A full spool drops a run of links and leaves a tombstone.
        fn drop_some(&mut self, dice: &mut Dice) {
            if self.links.len() < 4 {
                return;
            }
            let from = dice.roll(self.links.len() as u64 - 2) as usize;
            let gone: Vec<Link> = self.links.drain(from..from + 2).collect();
            let tombstone = Tombstone {
                epoch: EPOCH,
                first_seq: gone[0].first_seq(),
                last_seq: gone[1].last_seq(),
                by_severity: [0; 4],
                reason: LossReason::SpoolFull,
                prev: gone[0].prev(),
                hash: gone[1].hash(),
            };
            self.links.insert(from, Link::Tombstone(tombstone));
        }

        fn after(&self, cursor: Cursor) -> Option<Link> {
            self.links.iter().find(|link| link.last_seq() > cursor.seq).cloned()
        }

        fn acknowledge(&mut self, cursor: Cursor) {
            while self.links.front().is_some_and(|link| link.last_seq() <= cursor.seq) {
                self.links.pop_front();
            }
        }
    }

    /// The collector's disk.
    #[derive(Default)]
    struct Store {
        links: Vec<Link>,
    }

    impl Store {
        fn cursor(&self) -> Cursor {
            self.links.last().map_or(Cursor::START, |link| Cursor { seq: link.last_seq(), hash: link.hash() })
        }
    }

    fn hello() -> Hello {
        Hello {
            version: String::new(),
            instance: "c1".parse().unwrap(),
            epoch: EPOCH,
            directive: 0,
            heartbeat_secs: 5,
            understands: 2,
            at_us: Timestamp(0),
            mode: String::new(),
        }
    }

    /// Loses, repeats or delays what is under way.
    fn disturb(queue: &mut VecDeque<Frame>, dice: &mut Dice, loss: u64) {
        if queue.is_empty() || dice.roll(100) >= loss {
            return;
        }
        let at = dice.roll(queue.len() as u64) as usize;
        match dice.roll(3) {
            0 => drop(queue.remove(at)),
            1 => queue.push_back(queue[at].clone()),
            _ => queue.rotate_left(at),
        }
    }

    struct World {
        spool: Spool,
        store: Store,
        pair: Option<(Sender, Receiver)>,
        up: VecDeque<Frame>,
        down: VecDeque<Frame>,
        /// Taken by the collector and not yet on its disk.
        pending: VecDeque<Link>,
        now: Instant,
    }

    impl World {
        fn connect(&mut self) {
            let (sender, Frame::Hello(hello)) = Sender::new(hello(), self.now) else { panic!("no hello first") };
            let (receiver, welcome) = Receiver::new(&hello, self.store.cursor(), "", self.now);
            self.up.clear();
            self.pending.clear();
            self.down = VecDeque::from([welcome]);
            self.pair = Some((sender, receiver));
        }

        /// One step of each half; an error of either cuts the connection.
        fn step(&mut self, dice: &mut Dice) -> Result<(), SessionError> {
            let Some((sender, receiver)) = &mut self.pair else { return Ok(()) };
            let told = self.down.pop_front().map(|frame| sender.handle(frame, self.now)).transpose()?.flatten();
            if let Some(FromCollector::Acked(cursor) | FromCollector::Welcomed(Welcome { cursor, .. })) = told {
                self.spool.acknowledge(cursor);
            }
            if let Some(link) = sender.wants_after().and_then(|cursor| self.spool.after(cursor)) {
                self.up.push_back(sender.send(link, self.now));
            }
            if let Some(frame) = self.up.pop_front() {
                match receiver.handle(frame, self.now)? {
                    Some(FromAgent::Commit(link)) => self.pending.push_back(link),
                    Some(FromAgent::Reply(frame)) => self.down.push_back(frame),
                    _ => {}
                }
            }
            if dice.roll(2) == 0
                && let Some(link) = self.pending.pop_front()
            {
                self.store.links.push(link);
                let ack = receiver.committed(self.store.cursor());
                self.down.push_back(ack);
            }
            if self.now >= sender.timeout()
                && let Some(frame) = sender.handle_timeout(self.now)?
            {
                self.up.push_back(frame);
            }
            Ok(())
        }
    }

    /// Runs one fate and checks that what the collector holds is one whole chain.
    fn live(seed: u64, trouble: u64) {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut world = World {
            spool: Spool::default(),
            store: Store::default(),
            pair: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            pending: VecDeque::new(),
            now: Instant::now(),
        };
        for round in 0..1_500u32 {
            let calm = round > 900;
            world.now += Duration::from_millis(if calm { 500 } else { dice.roll(900) });
            if !calm && dice.roll(12) == 0 {
                world.spool.append(1 + dice.roll(5) as usize);
            }
            if !calm && dice.roll(150) == 0 {
                world.spool.drop_some(&mut dice);
            }
            if world.pair.is_none() || (!calm && dice.roll(400) < trouble) {
                world.connect();
            }
            if !calm {
                disturb(&mut world.up, &mut dice, trouble);
                disturb(&mut world.down, &mut dice, trouble);
            }
            // Four steps a round: replies may come faster than links, and a queue must be able to drain.
            match (0..4).try_for_each(|_| world.step(&mut dice)) {
                Ok(()) => {}
                Err(SessionError::Silent(_) | SessionError::Unexpected(_)) => world.pair = None,
                Err(error) => panic!("seed {seed}, trouble {trouble}, round {round}: {error}"),
            }
        }
        assert!(
            world.spool.links.is_empty(),
            "seed {seed}, trouble {trouble}: {} links never arrived",
            world.spool.links.len()
        );
        let mut cursor = Cursor::START;
        for link in &world.store.links {
            let Fit::Next(_, after) = cursor.fit(link.clone()) else {
                panic!("seed {seed}: not one chain after {cursor:?}")
            };
            cursor = after;
        }
        assert_eq!(cursor.seq, world.spool.last, "seed {seed}: the last events are missing");
    }

    #[test]
    fn every_event_arrives_once_and_in_order_whatever_the_network_does() {
        for trouble in [0, 5, 30, 80] {
            (1..=100).for_each(|seed| live(seed, trouble));
        }
    }

    #[test]
    fn a_changed_history_is_seen() {
        let mut spool = Spool::default();
        spool.append(2);
        spool.append(2);
        let (mut receiver, _) = Receiver::new(&hello(), Cursor { seq: 2, hash: Sha256([1; 32]) }, "", Instant::now());
        let second = spool.links[1].clone();
        assert_eq!(receiver.handle(Frame::Link(second), Instant::now()), Err(SessionError::ChainBroken { after: 2 }));
    }

    #[test]
    fn the_window_shuts_and_opens_again() {
        let now = Instant::now();
        let mut spool = Spool::default();
        (0..WINDOW_LINKS + 1).for_each(|_| spool.append(1));
        let (mut sender, _) = Sender::new(hello(), now);
        assert_eq!(sender.wants_after(), None, "before the welcome");
        sender
            .handle(Frame::Welcome(Welcome { version: String::new(), cursor: Cursor::START, keeps_gates: true }), now)
            .unwrap();
        while let Some(cursor) = sender.wants_after() {
            sender.send(spool.after(cursor).unwrap(), now);
        }
        assert_eq!(sender.under_way.len(), WINDOW_LINKS);
        let first = Cursor { seq: 1, hash: spool.links[0].hash() };
        sender.handle(Frame::Ack(first), now).unwrap();
        assert_eq!(sender.wants_after().map(|c| c.seq), Some(WINDOW_LINKS as u64));
    }

    #[test]
    fn silence_ends_the_session_and_a_heartbeat_keeps_it() {
        let start = Instant::now();
        let (mut sender, _) = Sender::new(hello(), start);
        let beat = start + Duration::from_secs(5);
        assert_eq!(sender.timeout(), beat);
        assert_eq!(sender.handle_timeout(beat), Ok(Some(Frame::Ping)));
        let end = start + Duration::from_secs(15);
        assert_eq!(sender.handle_timeout(end), Err(SessionError::Silent(Duration::from_secs(15))));
    }

    #[test]
    fn frames_of_the_wrong_side_are_errors() {
        let now = Instant::now();
        let (mut sender, _) = Sender::new(hello(), now);
        assert!(matches!(sender.handle(Frame::Ping, now), Err(SessionError::Unexpected(_))));
        let (mut receiver, _) = Receiver::new(&hello(), Cursor::START, "", now);
        assert!(matches!(receiver.handle(Frame::Ack(Cursor::START), now), Err(SessionError::Unexpected(_))));
        assert!(matches!(receiver.handle(Frame::Hello(hello()), now), Err(SessionError::Unexpected(_))));
    }
}
