//! The policy in force: checked before it is signed, its version only growing, an old text included.

use sidewarden_proto::directive::Directive;
use sidewarden_proto::policy::{Applied, Policy};
use sidewarden_proto::time::Timestamp;

use super::{Directives, Fleet, Reach, RevokeError};
use crate::ca::Issuer;

/// What agents must understand to go by a policy.
const NEEDS: u32 = 3;

/// Puts `text` in force; the policy and the version of the directive that carries it.
///
/// An agent that is too old for policies would go on without one: that must be `confirmed`.
pub fn apply(
    issuer: &Issuer,
    directives: &Directives,
    fleet: &Fleet,
    text: &str,
    confirmed: bool,
    now: Timestamp,
) -> Result<(Applied, u64), RevokeError> {
    Policy::parse(text).map_err(|faults| RevokeError::Wrong(faults.to_string()))?;
    let too_old = Reach::of(0, NEEDS, &fleet.all()).too_old;
    if !confirmed && !too_old.is_empty() {
        let who = format!("these agents are too old for policies and go on without: {}", too_old.join(", "));
        return Err(RevokeError::Unconfirmed(vec![who]));
    }
    let own = issuer.authority().own().borrow().clone();
    let mut applied = Applied { version: 1, text: text.to_owned() };
    let directive = directives.change(&own, now, |directive| {
        if let Some(before) = &directive.policy {
            applied.version = if before.text == text { before.version } else { before.version + 1 };
        }
        Ok::<_, RevokeError>(Directive { policy: Some(applied.clone()), ..directive })
    })?;
    Ok((applied, directive))
}
