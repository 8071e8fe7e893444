// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a confined process may do, thread by thread: seen in `/proc`, and tried.

#![allow(dead_code, reason = "not every test uses everything")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nix::libc;
use nix::unistd::Pid;

use super::inject::{Outcome, Stopped};

/// `CAP_IPC_LOCK` of include/uapi/linux/capability.h.
const IPC_LOCK: u64 = 1 << 14;
const IOMMU_DESTROY: u64 = 0x3b80;
const IOMMU_IOAS_ALLOC: u64 = 0x3b81;
const IOMMU_IOAS_COPY: u64 = 0x3b83;
const IOMMU_IOAS_MAP: u64 = 0x3b85;
const IOMMU_HWPT_ALLOC: u64 = 0x3b89;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;
const VFIO_DEVICE_BIND_IOMMUFD: u64 = 0x3b76;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: u64 = 0x3b77;
const VFIO_DEVICE_DETACH_IOMMUFD_PT: u64 = 0x3b78;
const VFIO_IOMMU_MAP_DMA: u64 = 0x3b71;
const TIOCSTI: u64 = 0x5412;
const FIONBIO: u64 = 0x5421;
/// `O_CREAT`, `O_EXCL`, `O_WRONLY`, `O_CLOEXEC`, `O_LARGEFILE`.
const MAKE_ANEW: u64 = 0o2_100_301;
/// No descriptor has this number.
const NO_FILE: u64 = 1_000_000;

/// The threads of a process: their names and numbers.
pub fn threads(process: u32) -> Vec<(String, Pid)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let thread = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((name.trim().to_owned(), Pid::from_raw(number)))
    };
    tasks.filter_map(thread).collect()
}

fn status(process: u32, thread: Pid) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).unwrap();
    let field = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    text.lines().filter_map(field).collect()
}

/// What this process may do, by its own status.
pub fn own_capabilities() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    u64::from_str_radix(text.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim(), 16).unwrap()
}

/// Every thread has a filter and no privilege but, where it is kept, that of locked memory.
pub fn assert_confined(process: u32, keeps_locked_memory: bool) {
    let kept = if keeps_locked_memory { own_capabilities() & IPC_LOCK } else { 0 };
    for (name, thread) in threads(process) {
        let status = status(process, thread);
        assert_eq!(status["Seccomp"], "2", "{name}");
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        for (set, expected) in [("CapEff", kept), ("CapPrm", kept), ("CapInh", 0), ("CapAmb", 0), ("CapBnd", 0)] {
            assert_eq!(u64::from_str_radix(&status[set], 16).unwrap(), expected, "{name}: {set}");
        }
    }
}

/// A call that is tried: what it is called here, its number, its arguments.
type Try = (&'static str, i64, [u64; 6]);

const fn ioctl(name: &'static str, request: u64) -> Try {
    (name, libc::SYS_ioctl, [NO_FILE, request, 0, 0, 0, 0])
}

/// What no thread may do.
const FORBIDDEN: &[Try] = &[
    ("open to write", libc::SYS_openat, [0, 0, 1, 0, 0, 0]),
    ("open to create", libc::SYS_openat, [0, 0, 0o100, 0, 0, 0]),
    ("open, by the older call", libc::SYS_open, [0; 6]),
    ("open by handle", libc::SYS_open_by_handle_at, [0; 6]),
    ("openat2", libc::SYS_openat2, [0; 6]),
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [0; 6]),
    ("fork", libc::SYS_fork, [0; 6]),
    ("a process, by clone", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
    ("socket", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
    ("connect", libc::SYS_connect, [NO_FILE, 0, 0, 0, 0, 0]),
    ("bind", libc::SYS_bind, [NO_FILE, 0, 0, 0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [u64::MAX, 0, 0, 0, 0, 0]),
    ("another's memory", libc::SYS_process_vm_readv, [0; 6]),
    ("another's file", libc::SYS_pidfd_getfd, [NO_FILE, 0, 0, 0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("another's thread", libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]),
    ("code, by mmap", libc::SYS_mmap, [0, 0x1000, 4, 0x22, u64::MAX, 0]),
    ("code, by mprotect", libc::SYS_mprotect, [0x1000, 0x1000, 5, 0, 0, 0]),
    ("code, by pkey_mprotect", libc::SYS_pkey_mprotect, [0x1000, 0x1000, 5, 0, 0, 0]),
    ("personality", libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]),
    ("core dumps again", libc::SYS_prctl, [4, 1, 0, 0, 0, 0]),
    ("another filter", libc::SYS_seccomp, [u64::MAX, 0, 0, 0, 0, 0]),
    ("handlers of signals", libc::SYS_rt_sigaction, [15, 0, 0, 8, 0, 0]),
    ("user", libc::SYS_setuid, [NO_FILE, 0, 0, 0, 0, 0]),
    ("namespace", libc::SYS_unshare, [u64::MAX, 0, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("chmod", libc::SYS_chmod, [0; 6]),
    ("rename", libc::SYS_rename, [0; 6]),
    ("link", libc::SYS_link, [0; 6]),
    ("bpf", libc::SYS_bpf, [NO_FILE, 0, 0, 0, 0, 0]),
    ("io_uring", libc::SYS_io_uring_setup, [0; 6]),
    ("keys", libc::SYS_keyctl, [NO_FILE, 0, 0, 0, 0, 0]),
    ("performance counters", libc::SYS_perf_event_open, [0; 6]),
    ("user's page faults", libc::SYS_userfaultfd, [u64::MAX, 0, 0, 0, 0, 0]),
    ("x32", libc::SYS_getpid | 0x4000_0000, [0; 6]),
    ioctl("the terminal's input", TIOCSTI),
    ioctl("reset of a device", VFIO_DEVICE_RESET),
    ioctl("binding a device", VFIO_DEVICE_BIND_IOMMUFD),
    ioctl("page tables of the hardware's", IOMMU_HWPT_ALLOC),
    ioctl("copy of an address space", IOMMU_IOAS_COPY),
    ioctl("type1", VFIO_IOMMU_MAP_DMA),
];

/// What some may: who, by the thread's name, and what the call returns with these arguments.
const SOME: &[(Try, &[&str], i64)] = &[
    (ioctl("an address space", IOMMU_IOAS_ALLOC), HOST, -EBADF),
    (ioctl("a mapping", IOMMU_IOAS_MAP), HOST, -EBADF),
    (ioctl("end of an object", IOMMU_DESTROY), HOST, -EBADF),
    (ioctl("attach", VFIO_DEVICE_ATTACH_IOMMUFD_PT), HOST, -EBADF),
    (ioctl("detach", VFIO_DEVICE_DETACH_IOMMUFD_PT), HOST_AND_WATCHER, -EBADF),
    (ioctl("no waiting", FIONBIO), &["control"], -EBADF),
    (("accept", libc::SYS_accept4, [NO_FILE, 0, 0, 0, 0, 0]), &["control", "frontend", "vhost-user"], -EBADF),
    (("watch a directory", libc::SYS_inotify_add_watch, [NO_FILE, 0, 0, 0, 0, 0]), &["nodes"], -EINVAL),
    (("remove a file", libc::SYS_unlink, [0; 6]), &["main"], -EFAULT),
    (("make a file anew", libc::SYS_openat, [NO_FILE, 0, MAKE_ANEW, 0, 0, 0]), &["metrics"], -EFAULT),
    (("rename a file", libc::SYS_renameat, [NO_FILE, 0, NO_FILE, 0, 0, 0]), &["metrics"], -EFAULT),
    (("remove a file of a directory", libc::SYS_unlinkat, [NO_FILE, 0, 0, 0, 0, 0]), &["metrics"], -EFAULT),
    (("wait for a process", libc::SYS_wait4, [NO_FILE, 0, 1, 0, 0, 0]), &["main", "control", "nodes"], -ECHILD),
    // The older call, which can be looked into, is taken then.
    (("a thread, by clone3", libc::SYS_clone3, [0; 6]), &["frontend", "vhost-user"], -ENOSYS),
    (("a name", libc::SYS_prctl, [15, 0, 0, 0, 0, 0]), &["frontend", "vhost-user"], -EFAULT),
    (("file system of a file", libc::SYS_fstatfs, [NO_FILE, 0, 0, 0, 0, 0]), &["frontend", "vhost-user"], -EBADF),
    (("read what is written elsewhere", libc::SYS_pread64, [NO_FILE, 0, 0, 0, 0, 0]), &["control", "watcher"], -EBADF),
];
/// What glibc and Rust's runtime try: that is no reason to die, and nothing comes of it.
const TRIED: &[Try] = &[
    ("open to read", libc::SYS_openat, [0; 6]),
    ("where a link leads", libc::SYS_readlink, [0; 6]),
    ("current directory", libc::SYS_getcwd, [0; 6]),
];
const HOST: &[&str] = &["main", "vring_worker", "frontend", "vhost-user", "control", "nodes"];
const HOST_AND_WATCHER: &[&str] = &["main", "vring_worker", "frontend", "vhost-user", "control", "nodes", "watcher"];
const EBADF: i64 = libc::EBADF as i64;
const EFAULT: i64 = libc::EFAULT as i64;
const EINVAL: i64 = libc::EINVAL as i64;
const ECHILD: i64 = libc::ECHILD as i64;
const ENOSYS: i64 = libc::ENOSYS as i64;

/// Tries what a thread may do and what not, in a process that traps what is not in the thread's list.
pub fn assert_calls(name: &str, thread: Pid) {
    let mut thread = Stopped::new(thread);
    for (what, number, arguments) in FORBIDDEN {
        assert_eq!(thread.call(*number, *arguments), Outcome::Trapped, "{name}: {what}");
    }
    // Kernels can be built without it.
    let has_inotify = Path::new("/proc/sys/fs/inotify").exists();
    for ((what, number, arguments), who, returned) in SOME {
        let is_there = has_inotify || *number != libc::SYS_inotify_add_watch;
        let returned = if is_there { *returned } else { -ENOSYS };
        let expected = if who.contains(&name) { Outcome::Returned(returned) } else { Outcome::Trapped };
        assert_eq!(thread.call(*number, *arguments), expected, "{name}: {what}");
    }
    for (what, number, arguments) in TRIED {
        assert_eq!(thread.call(*number, *arguments), Outcome::Returned(-ENOSYS), "{name}: {what}");
    }
}
