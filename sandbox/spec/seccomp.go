package spec

import (
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Error numbers and flags as every architecture here has them. They are part
// of the profile, not of the machine that it is made on.
const (
	eNOSYS = 38

	afALG   = 38
	afVSOCK = 40

	// The clone(2) flags that make namespaces: NEWNS, NEWCGROUP, NEWUTS,
	// NEWIPC, NEWUSER, NEWPID, NEWNET. NEWTIME shares its bit with the exit
	// signal and means nothing to clone.
	cloneNamespaces = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)

// freeCalls may be made by everybody and with any arguments: what the kernel
// itself guards well, or what nothing runs without. Names unknown to an
// architecture or to an older libseccomp are skipped by the runtimes. A call without
// conditions on its arguments is also one that the kernel (5.11 and later) answers
// from a bitmap without running the filter.
var freeCalls = words(`
	access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
	fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync
	flock fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64
	ioctl lchown lchown32 link linkat _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at
	newfstatat open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat
	readv rename renameat renameat2 rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statx symlink symlinkat
	sync sync_file_range sync_file_range2 syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat
	utimensat_time64 utimes vmsplice write writev cachestat listmount statmount

	fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr
	lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat

	epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
	eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch _newselect pipe pipe2 poll
	ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4 io_cancel io_destroy io_getevents
	io_pgetevents io_pgetevents_time64 io_setup io_submit

	accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64
	recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketpair

	brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect
	mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages

	capget capset execve execveat exit exit_group fork getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups
	getgroups32 getpgid getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32 getrlimit
	getrusage getsid gettid getuid getuid32 ioprio_get ioprio_set pause pidfd_open prctl prlimit64 setfsgid setfsgid32
	setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority setregid setregid32 setresgid
	setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 ugetrlimit vfork wait4 waitid
	waitpid

	futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list get_thread_area rseq
	set_robust_list set_thread_area set_tid_address getcpu sched_get_priority_max sched_get_priority_min
	sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
	sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield

	kill pidfd_send_signal restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
	rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn tgkill
	tkill uretprobe

	adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
	clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete
	timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
	timerfd_gettime64 timerfd_settime timerfd_settime64 times

	ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64
	mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget

	landlock_add_rule landlock_create_ruleset landlock_restrict_self lsm_get_self_attr lsm_list_modules
	lsm_set_self_attr seccomp

	getrandom sysinfo uname

	process_vm_readv process_vm_writev ptrace
`)

// archCalls are free on one architecture, by GOARCH.
var archCalls = map[string][]string{
	"amd64":   words("arch_prctl modify_ldt"),
	"386":     words("modify_ldt"),
	"arm64":   words("arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls"),
	"arm":     words("arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls"),
	"ppc64le": words("swapcontext"),
	"riscv64": words("riscv_flush_icache riscv_hwprobe"),
	"s390x":   words("s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
}

// capCalls come with a capability: without it the kernel would mostly refuse
// them anyway, and with it there was a reason to ask for it.
var capCalls = []struct {
	capability string
	calls      []string
}{
	{"CAP_BPF", words("bpf")},
	{"CAP_DAC_READ_SEARCH", words("open_by_handle_at")},
	{"CAP_PERFMON", words("perf_event_open")},
	{"CAP_SYSLOG", words("syslog")},
	{"CAP_SYS_ADMIN", words(`bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount
		mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog
		umount umount2 unshare`)},
	{"CAP_SYS_BOOT", words("reboot")},
	{"CAP_SYS_CHROOT", words("chroot")},
	{"CAP_SYS_MODULE", words("delete_module finit_module init_module")},
	{"CAP_SYS_NICE", words("get_mempolicy mbind set_mempolicy set_mempolicy_home_node")},
	{"CAP_SYS_PACCT", words("acct")},
	{"CAP_SYS_PTRACE", words("kcmp pidfd_getfd process_madvise")},
	{"CAP_SYS_RAWIO", words("ioperm iopl")},
	{"CAP_SYS_TIME", words("clock_settime clock_settime64 settimeofday stime")},
	{"CAP_SYS_TTY_CONFIG", words("vhangup")},
}

// seccompArches are the ABIs of a machine, by GOARCH, its own one first. x32
// is left out: no distribution has it on, and each ABI is a filter of its own.
var seccompArches = map[string][]specs.Arch{
	"amd64":   {specs.ArchX86_64, specs.ArchX86},
	"386":     {specs.ArchX86},
	"arm64":   {specs.ArchAARCH64, specs.ArchARM},
	"arm":     {specs.ArchARM},
	"ppc64le": {specs.ArchPPC64LE},
	"riscv64": {specs.ArchRISCV64},
	"s390x":   {specs.ArchS390X, specs.ArchS390},
	"loong64": {specs.ArchLOONGARCH64},
}

// DefaultSeccomp returns berth's own profile, which RuntimeDefault stands for:
// an allow-list for a container with these bounding capabilities ("CAP_"
// prefixed) on an architecture as runtime.GOARCH calls it. What is not allowed
// fails with EPERM, but for two calls:
//
//   - clone3 without CAP_SYS_ADMIN fails with ENOSYS, since a filter can not see
//     its flags and every C library then falls back to clone;
//   - socketcall, the 32-bit way to open sockets, fails with ENOSYS, since a
//     filter can not see the address family. Programs built for 32 bits that do
//     not know the direct calls of Linux 4.3 have no network under this profile.
//
// Sockets of the families AF_ALG and AF_VSOCK can not be made: the first let a
// container write to the page cache of layers that others use
// (CVE-2026-31431), the second talks to the hypervisor past the pod's network.
func DefaultSeccomp(caps []string, arch string) *specs.LinuxSeccomp {
	free := slices.Concat(freeCalls, archCalls[arch])
	for _, c := range capCalls {
		if slices.Contains(caps, c.capability) {
			free = append(free, c.calls...)
		}
	}
	slices.Sort(free)
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: slices.Clone(seccompArches[arch]),
		Syscalls: []specs.LinuxSyscall{
			// This rule stands before those of socket: libseccomp gives
			// 32-bit ABIs an allowed socketcall along with each of them,
			// unless one is there. It must not be EPERM either, because runtimes
			// leave out rules that only say what the default is.
			{Names: []string{"socketcall"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(eNOSYS))},
			{Names: slices.Compact(free), Action: specs.ActAllow},
		},
	}
	// Conditions on one argument are alternatives for some runtimes and
	// libseccomp takes only one each, so a range has to be a rule.
	p.Syscalls = append(p.Syscalls,
		allowIf("socket", 0, afALG, specs.OpLessThan),
		allowIf("socket", 0, afALG+1, specs.OpEqualTo),
		allowIf("socket", 0, afVSOCK, specs.OpGreaterThan))
	// PER_LINUX, PER_LINUX32, UNAME26 with both, and asking for the present one.
	for _, persona := range []uint64{0, 8, 0x20000, 0x20008, 0xffffffff} {
		p.Syscalls = append(p.Syscalls, allowIf("personality", 0, persona, specs.OpEqualTo))
	}
	if !slices.Contains(caps, "CAP_SYS_ADMIN") {
		p.Syscalls = append(p.Syscalls, cloneRules(arch)...)
	}
	return p
}

// cloneRules allow processes and threads, but no namespaces.
func cloneRules(arch string) []specs.LinuxSyscall {
	flags := uint(0)
	if arch == "s390x" {
		flags = 1 // the stack comes first there
	}
	return []specs.LinuxSyscall{
		{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
			{Index: flags, Value: cloneNamespaces, ValueTwo: 0, Op: specs.OpMaskedEqual},
		}},
		{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(eNOSYS))},
	}
}

func allowIf(call string, arg uint, value uint64, op specs.LinuxSeccompOperator) specs.LinuxSyscall {
	return specs.LinuxSyscall{
		Names:  []string{call},
		Action: specs.ActAllow,
		Args:   []specs.LinuxSeccompArg{{Index: arg, Value: value, Op: op}},
	}
}

func words(s string) []string { return strings.Fields(s) }
