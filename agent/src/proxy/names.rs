//! Which of several services behind one listener a client asks for, by the host name in its ClientHello (SNI). Pure.
//!
//! A listener with one service and no name takes whoever comes, whatever they ask for. As soon as names are given, they
//! are meant: who asks for a name that is not there is refused, and who asks for none gets the service without a name.

use sidewarden_proto::tls::dns_matches;

/// Services by name, in the order of the configuration.
#[derive(Clone, Debug)]
pub struct Names<T> {
    services: Vec<(Option<String>, T)>,
}

impl<T> Names<T> {
    /// Of services and their names; each name, and the lack of one, stands here once.
    pub fn new(services: Vec<(Option<String>, T)>) -> Names<T> {
        Names { services }
    }

    /// The service for a client that asked for `name`; an exact name goes before a wildcard.
    pub fn find(&self, name: Option<&str>) -> Option<&T> {
        if let [(None, only)] = &self.services[..] {
            return Some(only);
        }
        let exact = self.services.iter().find(|(known, _)| known.as_deref() == name);
        let covering = || self.services.iter().find(|(known, _)| covers(known.as_deref(), name));
        exact.or_else(covering).map(|(_, service)| service)
    }

    /// All services, in the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.services.iter().map(|(_, service)| service)
    }
}

fn covers(known: Option<&str>, name: Option<&str>) -> bool {
    matches!((known, name), (Some(known), Some(name)) if dns_matches(known, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[Option<&str>], rows: &[(Option<&str>, Option<usize>)]) {
        let services = names.iter().enumerate().map(|(i, name)| (name.map(str::to_owned), i)).collect();
        let names = Names::new(services);
        for (asked, expected) in rows {
            assert_eq!(names.find(*asked).copied(), *expected, "{names:?} {asked:?}");
        }
    }

    #[test]
    fn one_service_without_a_name_takes_whoever_comes() {
        check(&[None], &[(None, Some(0)), (Some("a.example"), Some(0))]);
    }

    #[test]
    fn names_that_are_given_are_meant() {
        check(&[Some("a.example")], &[(Some("a.example"), Some(0)), (Some("b.example"), None), (None, None)]);
        let all = [Some("a.shop.example"), None, Some("*.shop.example"), Some("b.shop.example")];
        check(
            &all,
            &[
                (Some("a.shop.example"), Some(0)),
                (Some("b.shop.example"), Some(3)),
                (Some("c.shop.example"), Some(2)),
                (Some("c.b.shop.example"), None),
                (Some("shop.example"), None),
                (None, Some(1)),
            ],
        );
        check(&[], &[(None, None), (Some("a.example"), None)]);
    }
}
