// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests, resets and changes of memory in any order, over the real backends on a model of the kernel, with a failure at each
//! call of the kernel in turn. After each step the model's DMA is compared with what the guest can conclude from the answers.

use std::collections::BTreeSet;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestMemoryMmap};

use super::*;
use crate::host::fake::kernel::{FakeKernel, KernelFailure, Place};
use crate::host::iommufd::IommufdGroup;
use crate::memory::{HostSegment, RamRegion};

const PAGE: u64 = 0x1000;
/// Alone in a group whose device somebody else bound to the iommufd.
const SHARED: EndpointId = EndpointId(1);
/// Two in a group that was bound here, with pinned memory.
const TWO: [EndpointId; 2] = [EndpointId(2), EndpointId(3)];
/// In a container of type1.
const CONTAINED: EndpointId = EndpointId(4);
/// Emulated.
const EMULATED: EndpointId = EndpointId(5);
const ALL: [EndpointId; 5] = [SHARED, TWO[0], TWO[1], CONTAINED, EMULATED];
const GROUPS: [&[EndpointId]; 4] = [&[SHARED], &TWO, &[CONTAINED], &[EMULATED]];
/// What the contained one cannot reach, in pages.
const RESERVED_PAGE: u64 = 6;
/// How far the check looks, in pages.
const PAGES: u64 = 28;

#[derive(Clone, Copy, Debug)]
enum Step {
    Attach { domain: u32, endpoint: usize, bypass: bool },
    Detach { domain: u32, endpoint: usize },
    Map { domain: u32, page: u64, pages: u64, physical: u64, flags: u32, between: Between },
    Unmap { domain: u32, page: u64, pages: u64 },
    Memory(usize),
    Bypass(bool),
    Reset,
}

/// What happens between two steps of a MAP, if it takes several.
#[derive(Clone, Copy, Debug)]
enum Between {
    Nothing,
    Memory(usize),
    Bypass(bool),
    Reset,
}

fn between() -> impl Strategy<Value = Between> {
    prop_oneof![
        5 => Just(Between::Nothing),
        1 => (0..4usize).prop_map(Between::Memory),
        1 => any::<bool>().prop_map(Between::Bypass),
        1 => Just(Between::Reset),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let domain = 1..4u32;
    let endpoint = 0..ALL.len();
    prop_oneof![
        4 => (domain.clone(), endpoint.clone(), prop::bool::weighted(0.15))
            .prop_map(|(domain, endpoint, bypass)| Step::Attach { domain, endpoint, bypass }),
        1 => (domain.clone(), endpoint).prop_map(|(domain, endpoint)| Step::Detach { domain, endpoint }),
        6 => (domain.clone(), 0..16u64, 1..6u64, 0..24u64, 1..4u32, between()).prop_map(
            |(domain, page, pages, physical, flags, between)| Step::Map { domain, page, pages, physical, flags, between }
        ),
        3 => (domain, 0..16u64, 1..10u64).prop_map(|(domain, page, pages)| Step::Unmap { domain, page, pages }),
        1 => (0..4usize).prop_map(Step::Memory),
        1 => any::<bool>().prop_map(Step::Bypass),
        1 => Just(Step::Reset),
    ]
}

/// Guest memories: all of it, without the upper part, with another upper part, none.
fn memories() -> Vec<GuestRam> {
    let file = || {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 8 * PAGE).unwrap();
        std::fs::File::from(file)
    };
    let (low, high, other) = (file(), file(), file());
    let region = |start: u64, file: Option<&std::fs::File>| {
        let file = file.map(|file| FileOffset::new(file.try_clone().unwrap(), 0));
        (GuestAddress(start), 8 * PAGE as usize, file)
    };
    let ram = |regions: Vec<_>| {
        GuestRam::from_mmap(&GuestMemoryMmap::<()>::from_ranges_with_files(regions).unwrap()).unwrap()
    };
    // The middle part has no file.
    let middle = region(8 * PAGE, None);
    let all = |high| ram(vec![region(0, Some(&low)), middle.clone(), region(16 * PAGE, Some(high))]);
    vec![all(&high), ram(vec![region(0, Some(&low))]), all(&other), GuestRam::default()]
}

/// The guest-physical address of a place in memory; `None` if it is none of the guest's. `memories` are all that there have been:
/// a file that is mapped once more is still the same memory by its former addresses.
fn physical_of(place: Place, ram: &GuestRam, memories: &[GuestRam]) -> Option<u64> {
    let stays = |whole: &HostSegment| ram.regions().iter().any(|region| region.whole().is_same(whole));
    memories.iter().flat_map(GuestRam::regions).map(RamRegion::whole).filter(stays).find_map(|whole| {
        let host = whole.host()?;
        let offset = match place {
            Place::Address(address) => address.checked_sub(host.address())?,
            Place::File(identity, offset) => {
                let file = host.pinnable_file().filter(|file| file.identity() == identity)?;
                offset.checked_sub(file.offset())?
            }
        };
        (offset < whole.length()).then(|| whole.start().0 + offset)
    })
}

/// What a guest knows from the answers.
#[derive(Default)]
struct Guest {
    bypass: bool,
    domain_of: BTreeMap<EndpointId, u32>,
    domains: BTreeMap<u32, Known>,
}

#[derive(Default)]
struct Known {
    bypass: bool,
    /// By first page: pages, first physical page, flags.
    mappings: BTreeMap<u64, (u64, u64, u32)>,
}

impl Guest {
    fn leave(&mut self, endpoint: EndpointId) {
        if let Some(domain) = self.domain_of.remove(&endpoint)
            && !self.domain_of.values().any(|other| *other == domain)
        {
            self.domains.remove(&domain);
        }
    }

    /// Whether an access of a member of a group may reach this address.
    fn allows(&self, members: &[EndpointId], iova: u64, physical: u64, flag: u32) -> bool {
        let domains: BTreeSet<u32> = members.iter().filter_map(|member| self.domain_of.get(member).copied()).collect();
        let mut domains = domains.into_iter();
        match (domains.next(), domains.next()) {
            (None, _) => self.bypass && iova == physical,
            (Some(_), Some(_)) => false,
            (Some(domain), None) => {
                let known = &self.domains[&domain];
                let page = iova / PAGE;
                let covering = known.mappings.range(..=page).next_back();
                let maps = covering.is_some_and(|(start, (pages, first, flags))| {
                    page - start < *pages && flags & flag != 0 && physical == iova - start * PAGE + first * PAGE
                });
                maps || known.bypass && iova == physical
            }
        }
    }
}

struct Run {
    kernel: FakeKernel,
    device: VirtioIommu,
    guest: Guest,
    memories: Vec<GuestRam>,
    memory: usize,
}

impl Run {
    fn new(memories: &[GuestRam], entry_limit: u32) -> Self {
        let kernel = FakeKernel::new();
        let usable = RangeSet::from(range("0-ffffff"));
        let hole = IovaRange::from_length(RESERVED_PAGE * PAGE, PAGE).unwrap();
        let iommufd = kernel.iommufd();
        let shared = kernel.devices(&[SHARED], &usable);
        shared[0].1.bind(&iommufd).unwrap();
        let two = kernel.devices(&TWO, &usable);
        let bound = IommufdGroup::bound(Arc::clone(&iommufd), two).unwrap().with_pinned_source().unwrap();
        let narrow = usable.subtract(&RangeSet::from(hole));
        let contained = kernel.container(&[CONTAINED], narrow, entry_limit).into_group(vec![CONTAINED]).unwrap();
        let groups: Vec<Arc<dyn HostGroup>> = vec![
            Arc::new(IommufdGroup::shared(iommufd, shared)),
            Arc::new(bound),
            Arc::new(contained),
            Arc::new(SoftwareGroup::new(vec![EMULATED], PAGE)),
        ];
        let reserved = EndpointView::new(vec![ReservedRegion { range: hole, kind: ReservedKind::Reserved }]).unwrap();
        let view = |id| if id == CONTAINED { reserved.clone() } else { EndpointView::default() };
        let settings = Settings { boot_bypass: false, map_step: 2 * PAGE, ..Settings::new(range("0-ffffff"), PAGE) };
        let device = VirtioIommu::new(settings, ALL.map(|id| (id, view(id))).to_vec(), groups).unwrap();
        let mut run = Self { kernel, device, guest: Guest::default(), memories: memories.to_vec(), memory: 0 };
        run.device.set_memory(run.memories[0].clone());
        run.device.set_driver_features(run.device.features());
        run
    }

    /// Takes a step; the status of its answer.
    fn take(&mut self, step: Step) -> u8 {
        let span = |page: u64, pages: u64| IovaRange::from_length(page * PAGE, pages * PAGE).unwrap();
        match step {
            Step::Attach { domain, endpoint, bypass } => {
                let endpoint = ALL[endpoint];
                let status = self.send(&attach_bytes(domain, endpoint, u32::from(bypass)));
                if status == OK && self.guest.domain_of.get(&endpoint) != Some(&domain) {
                    self.guest.leave(endpoint);
                    self.guest.domain_of.insert(endpoint, domain);
                    self.guest.domains.entry(domain).or_insert(Known { bypass, ..Known::default() });
                }
                status
            }
            Step::Detach { domain, endpoint } => {
                let mut bytes = vec![2, 0, 0, 0];
                bytes.extend(domain.to_le_bytes());
                bytes.extend(ALL[endpoint].0.to_le_bytes());
                bytes.extend([0; 8]);
                let status = self.send(&bytes);
                if status == OK {
                    self.guest.leave(ALL[endpoint]);
                }
                status
            }
            Step::Map { domain, page, pages, physical, flags, between } => {
                let bytes = map_bytes(domain, span(page, pages), physical * PAGE, flags);
                let mut reply = [0xaa; 4];
                let mut progress = self.device.begin(&bytes, &mut reply);
                if let Progress::Unfinished(map) = progress {
                    // The host has what the guest asked for, in part.
                    let known = self.guest.domains.get_mut(&domain).expect("only a domain can be mapped in");
                    known.mappings.insert(page, (pages, physical, flags));
                    self.check_sound();
                    match between {
                        Between::Nothing => OK,
                        Between::Memory(memory) => self.take(Step::Memory(memory)),
                        Between::Bypass(bypass) => self.take(Step::Bypass(bypass)),
                        Between::Reset => self.take(Step::Reset),
                    };
                    self.check_sound();
                    if let Some(known) = self.guest.domains.get_mut(&domain) {
                        known.mappings.remove(&page);
                    }
                    progress = self.device.go_on(map, &mut reply);
                }
                while let Progress::Unfinished(map) = progress {
                    progress = self.device.go_on(map, &mut reply);
                }
                assert!(matches!(progress, Progress::Answered { used: 4 }));
                let [status, 0, 0, 0] = reply else { panic!("a tail of {reply:?}") };
                if status == OK {
                    let known = self.guest.domains.get_mut(&domain).expect("only a domain can be mapped in");
                    known.mappings.insert(page, (pages, physical, flags));
                }
                status
            }
            Step::Unmap { domain, page, pages } => {
                let status = self.send(&unmap_bytes(domain, span(page, pages)));
                // With DEVERR they are gone, and the domain is blocked until it is empty.
                if status == OK || status == DEVERR {
                    let known = self.guest.domains.get_mut(&domain).expect("only a domain can be unmapped in");
                    known.mappings.retain(|start, _| *start < page || page + pages <= *start);
                }
                status
            }
            Step::Memory(memory) => {
                self.memory = memory;
                self.device.set_memory(self.memories[memory].clone());
                OK
            }
            Step::Bypass(bypass) => {
                self.guest.bypass = bypass;
                self.device.write_config(config::BYPASS, &[u8::from(bypass)]);
                OK
            }
            Step::Reset => {
                self.guest.domain_of.clear();
                self.guest.domains.clear();
                self.device.reset();
                self.device.set_driver_features(self.device.features());
                OK
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> u8 {
        let mut reply = [0xaa; 4];
        assert_eq!(self.device.handle(bytes, &mut reply), 4);
        assert_eq!(reply[1..], [0; 3]);
        reply[0]
    }

    /// Where each endpoint's DMA lands, page by page, for reading and writing.
    fn landscape(&self) -> Vec<(usize, u64, u32, Place)> {
        let mut landscape = Vec::new();
        for (index, endpoint) in ALL.into_iter().enumerate() {
            for page in 0..PAGES {
                for (flag, access) in [(READ, Access::READ), (WRITE, Access::WRITE)] {
                    let place = self.kernel.dma(endpoint, page * PAGE, access);
                    landscape.extend(place.map(|place| (index, page, flag, place)));
                }
            }
        }
        landscape
    }

    /// I1, I6, I8, I9, I15, I16 of docs/invariants.md: whatever DMA reaches is guest memory, and what the guest asked for.
    fn check_sound(&self) {
        for (index, page, flag, place) in self.landscape() {
            let endpoint = ALL[index];
            let physical = physical_of(place, &self.memories[self.memory], &self.memories);
            let physical = physical.unwrap_or_else(|| panic!("{endpoint} reaches {place:?}, which is no guest memory"));
            let members = GROUPS.into_iter().find(|members| members.contains(&endpoint)).unwrap();
            let allowed = self.guest.allows(members, page * PAGE, physical, flag);
            assert!(allowed, "{endpoint} reaches {physical:#x} at {:#x}", page * PAGE);
            assert!(endpoint != CONTAINED || page != RESERVED_PAGE);
        }
    }

    /// I2: what the guest asked for is reached.
    fn check_complete(&self) {
        let ram = &self.memories[self.memory];
        for (endpoint, domain) in self.guest.domain_of.iter().filter(|(id, _)| **id != EMULATED) {
            let members = GROUPS.into_iter().find(|members| members.contains(endpoint)).unwrap();
            let agree = members.iter().all(|member| self.guest.domain_of.get(member).is_none_or(|d| d == domain));
            for (start, (pages, first, flags)) in &self.guest.domains[domain].mappings {
                if !agree || !ram.covers(GuestAddress(first * PAGE), pages * PAGE) {
                    continue;
                }
                for page in 0..*pages {
                    for (flag, access) in [(READ, Access::READ), (WRITE, Access::WRITE)] {
                        let place = self.kernel.dma(*endpoint, (start + page) * PAGE, access);
                        let reached = place.and_then(|place| physical_of(place, ram, &self.memories));
                        let wanted = (flags & flag != 0).then_some((first + page) * PAGE);
                        assert_eq!(reached, wanted, "{endpoint} at {:#x}", (start + page) * PAGE);
                    }
                }
            }
        }
    }
}

/// I14: what is saved can be restored, and is the same.
fn check_saved(memories: &[GuestRam], run: &mut Run) {
    let state = run.device.save();
    let mut restored = Run::new(memories, 65535);
    restored.device.set_memory(memories[run.memory].clone());
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    // The same memory may be mapped by another address of this process.
    let physical = |run: &Run| -> Vec<_> {
        let landscape = run.landscape().into_iter();
        landscape
            .map(|(index, page, flag, place)| (index, page, flag, physical_of(place, &memories[run.memory], memories)))
            .collect()
    };
    restored.memory = run.memory;
    assert_eq!(physical(&restored), physical(run));
}

/// Takes all steps, without failures and in step with the kernel throughout. How many calls the kernel had.
fn run_well(memories: &[GuestRam], steps: &[Step]) -> u64 {
    let mut run = Run::new(memories, 65535);
    let before = run.kernel.calls();
    for step in steps {
        let landscape = run.landscape();
        let status = run.take(*step);
        // I5
        let changed_between = matches!(step, Step::Map { between, .. } if !matches!(between, Between::Nothing));
        assert!(
            status == OK || changed_between || run.landscape() == landscape,
            "{step:?} was refused and changed something"
        );
        run.check_sound();
        run.check_complete();
        check_saved(memories, &mut run);
    }
    let calls = run.kernel.calls() - before;
    let kernel = run.kernel.clone();
    run.device.shut_down();
    assert_eq!(kernel.objects(), 2, "the pinned source and its hardware page table are left");
    drop(run);
    assert_eq!(kernel.objects(), 0);
    calls
}

/// Takes all steps with a failure at one call.
fn run_failing(memories: &[GuestRam], steps: &[Step], at: u64, failure: KernelFailure, entry_limit: u32) {
    let mut run = Run::new(memories, entry_limit);
    run.kernel.fail_after(at, failure);
    for step in steps {
        run.take(*step);
        run.check_sound();
    }
}

/// Takes all steps: well, then with a failure at each call in turn.
fn explore(steps: &[Step]) {
    let memories = memories();
    let calls = run_well(&memories, steps);
    let failures = [Errno::NOMEM, Errno::IO, Errno::BUSY, Errno::ADDRINUSE].map(KernelFailure::Errno);
    for (at, failure) in (0..calls).zip(failures.into_iter().cycle()) {
        run_failing(&memories, steps, at, failure, if at % 2 == 0 { 65535 } else { 3 });
        run_failing(&memories, steps, at, KernelFailure::Short, 65535);
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn dma_goes_where_the_guest_said_whatever_fails(steps in steps()) {
        explore(&steps);
    }
}

/// The same for as many seconds as `SOAK_SECONDS` says.
#[test]
#[ignore = "make soak"]
fn soak() {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    let mut cases: u64 = 0;
    while std::time::Instant::now() < end {
        let config = ProptestConfig { cases: 64, source_file: Some(file!()), ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        let result = runner.run(&steps(), |steps| {
            explore(&steps);
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
        cases += 64;
    }
    println!("{cases} sequences in {seconds} s");
}
