//! When the certificates end that the collector answers for, those that others keep for it included: told after a start, and
//! whenever one of them is another.

use sidewarden_proto::event::{Body, CaCertificate, CaCertificates, Event, Severity};

use super::authority::{Authority, Dates};
use crate::app::Core;

/// Every root with its issuing CA, and the collector's own. With several roots each has its number and what it is used for.
pub fn dates_of(authority: &Authority) -> Vec<CaCertificate> {
    let dates = authority.dates();
    let is_one = dates.iter().all(|one| one.number == dates[0].number);
    let name = |one: &Dates| if is_one { String::new() } else { format!("{}, {}", one.number, one.stage.word()) };
    let certificate = |one: &Dates| CaCertificate {
        what: one.what.into(),
        name: name(one),
        not_before_us: one.not_before,
        not_after_us: one.not_after,
    };
    dates.iter().map(certificate).collect()
}

/// Tells of them until the shutdown.
pub async fn tell(core: Core) {
    let mut own = core.issuer.authority().own();
    let (mut front, mut page) = (core.identities.front(), core.identities.page());
    loop {
        own.mark_unchanged();
        front.mark_unchanged();
        page.mark_unchanged();
        let certificates = [dates_of(core.issuer.authority()), core.identities.dates()].concat();
        let summary = format!("{} certificates of the CA and the collector", certificates.len());
        let body = Body::from(CaCertificates { certificates });
        if core.commits.own(Event::new((core.clock)(), Severity::Info, summary, &body)).await.is_err() {
            return;
        }
        tokio::select! {
            () = core.shutdown.cancelled() => return,
            changed = own.changed() => if changed.is_err() { return },
            changed = front.changed() => if changed.is_err() { return },
            changed = page.changed() => if changed.is_err() { return },
        }
    }
}
