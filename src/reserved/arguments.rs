// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator may choose about reserved regions, on the command line of either program.

use clap::Args;

use super::plan::{Inbound, PeerToPeer, Policy, Relaxable, X86_MSI};
use super::{Fact, HostFacts, Source};
use crate::range::{IovaRange, ParseRangeError};

/// Options that decide what a guest is told.
#[derive(Clone, Debug, Args)]
pub struct PolicyArguments {
    /// The virtual addresses that the guest is offered, both ends included. By default what the facts allow.
    #[arg(long, value_name = "START-END")]
    input_range: Option<IovaRange>,

    /// How many bits of address the guest is offered at most, also of the input range.
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u8).range(12..=64))]
    max_address_width: Option<u8>,

    /// The MSI doorbell of the guest's machine, or `none`. By default, on x86-64, fee00000-feefffff.
    #[arg(long, value_name = "START-END|none", value_parser = parse_guest_msi, required = !cfg!(target_arch = "x86_64"))]
    guest_msi: Option<GuestMsi>,

    /// Whether the guest is told of regions that firmware uses until a driver takes over (`direct-relaxable`).
    #[arg(long, value_name = "ignore|report", default_value = "ignore")]
    relaxable: Relaxable,

    /// Whether the guest is told where devices cannot reach memory, if the host's device tree says so.
    #[arg(long, value_name = "report|withhold", default_value = "report")]
    inbound: Inbound,

    /// What is done about devices that can reach each other's BARs, because they share a host IOMMU group.
    #[arg(long, value_name = "warn|carve-bars", default_value = "warn")]
    p2p: PeerToPeer,

    /// A memory window of the host bridge, where devices see it, in place of those that the host shows. Can be given several
    /// times. Windows are never reported: they help to tell what the host's reserved regions are.
    #[arg(long, value_name = "START-END")]
    host_window: Vec<IovaRange>,
}

impl Default for PolicyArguments {
    /// As if no option were given, with the doorbell of x86.
    fn default() -> Self {
        let Policy { relaxable, inbound, peer_to_peer, max_address_width, input_range, .. } = Policy::default();
        let (guest_msi, host_window) = (Some(GuestMsi::At(X86_MSI)), Vec::new());
        Self { input_range, max_address_width, guest_msi, relaxable, inbound, p2p: peer_to_peer, host_window }
    }
}

impl PolicyArguments {
    /// The choices.
    pub fn policy(&self) -> Policy {
        Policy {
            relaxable: self.relaxable,
            inbound: self.inbound,
            peer_to_peer: self.p2p,
            max_address_width: self.max_address_width,
            input_range: self.input_range,
            guest_msi: self.guest_msi.unwrap_or(GuestMsi::At(X86_MSI)).range(),
            ..Policy::default()
        }
    }

    /// Puts what the operator knows in place of what the host shows.
    pub fn amend(&self, facts: &mut HostFacts) {
        if !self.host_window.is_empty() {
            facts.windows = Some(self.host_window.iter().copied().collect());
            facts.sources.insert(Fact::Windows, Source::Operator);
        }
    }
}

/// Where the guest's machine decodes message-signalled interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestMsi {
    /// At these addresses.
    At(IovaRange),
    /// At no fixed address.
    None,
}

impl GuestMsi {
    /// The addresses.
    const fn range(self) -> Option<IovaRange> {
        match self {
            Self::At(range) => Some(range),
            Self::None => None,
        }
    }
}

/// Reads `START-END` or `none`.
///
/// # Errors
///
/// [`ParseRangeError`]
fn parse_guest_msi(text: &str) -> Result<GuestMsi, ParseRangeError> {
    if text == "none" { Ok(GuestMsi::None) } else { text.parse().map(GuestMsi::At) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::range::RangeSet;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        policy: PolicyArguments,
    }

    fn parse(arguments: &[&str]) -> Option<PolicyArguments> {
        let arguments = ["program"].iter().chain(arguments);
        Command::try_parse_from(arguments).ok().map(|command| command.policy)
    }

    #[test]
    fn every_choice_reaches_the_policy() {
        let doorbell = "--guest-msi=8090000-809ffff";
        let policy = parse(&[doorbell]).unwrap().policy();
        assert_eq!(policy, Policy { guest_msi: "8090000-809ffff".parse().ok(), ..Policy::default() });
        assert_eq!(parse(&["--guest-msi=none"]).unwrap().policy().guest_msi, None);
        assert!(parse(&["--guest-msi=maybe"]).is_none());
        #[cfg(target_arch = "x86_64")]
        assert_eq!(parse(&[]).unwrap().policy().guest_msi, Some(X86_MSI));
        let all = ["--relaxable=report", "--inbound=withhold", "--p2p=carve-bars", "--max-address-width=39"];
        let policy = parse(&[&[doorbell, "--input-range=1000-ffff"], &all[..]].concat()).unwrap().policy();
        assert_eq!(policy.relaxable, Relaxable::Report);
        assert_eq!(policy.inbound, Inbound::Withhold);
        assert_eq!(policy.peer_to_peer, PeerToPeer::CarveBars);
        assert_eq!((policy.max_address_width, policy.input_range), (Some(39), "1000-ffff".parse().ok()));
        assert!(parse(&[doorbell, "--max-address-width=65"]).is_none());
    }

    #[test]
    fn windows_of_the_operator_take_the_place_of_those_found() {
        let mut facts = HostFacts {
            windows: Some(RangeSet::from(IovaRange::ALL)),
            sources: [(Fact::Windows, Source::ProcIomem)].into(),
            ..HostFacts::default()
        };
        let before = facts.clone();
        parse(&["--guest-msi=none"]).unwrap().amend(&mut facts);
        assert_eq!(facts, before);
        parse(&["--guest-msi=none", "--host-window=1000-1fff", "--host-window=2000-2fff"]).unwrap().amend(&mut facts);
        assert_eq!(facts.windows.unwrap().to_string(), "0x1000-0x2fff");
        assert_eq!(facts.sources, [(Fact::Windows, Source::Operator)].into());
    }
}
