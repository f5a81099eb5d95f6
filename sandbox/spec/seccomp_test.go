package spec

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestDefaultSeccompGolden(t *testing.T) {
	golden(t, "seccomp_amd64", DefaultSeccomp(defaultCapabilities, "amd64"))
	golden(t, "seccomp_arm64_all", DefaultSeccomp(knownCapabilities, "arm64"))
}

// decide is what a profile answers to a call, as the kernel would.
func decide(t *testing.T, p *specs.LinuxSeccomp, call string, args ...uint64) string {
	t.Helper()
	for _, r := range p.Syscalls {
		if !slices.Contains(r.Names, call) || !matches(t, r.Args, args) {
			continue
		}
		if r.Action == specs.ActAllow {
			return "allow"
		}
		if r.ErrnoRet != nil && *r.ErrnoRet == eNOSYS {
			return "ENOSYS"
		}
		return string(r.Action)
	}
	return "EPERM"
}

func matches(t *testing.T, conditions []specs.LinuxSeccompArg, args []uint64) bool {
	for _, c := range conditions {
		if int(c.Index) >= len(args) {
			t.Fatalf("no argument %d in %v", c.Index, args)
		}
		v := args[c.Index]
		ok := map[specs.LinuxSeccompOperator]bool{
			specs.OpEqualTo: v == c.Value, specs.OpLessThan: v < c.Value, specs.OpGreaterThan: v > c.Value, specs.OpMaskedEqual: v&c.Value == c.ValueTwo,
		}[c.Op]
		if !ok {
			return false
		}
	}
	return true
}

func TestDefaultSeccompDecides(t *testing.T) {
	const thread = 0x3d0f00 // what the C libraries and Go start a thread with
	admin := append(slices.Clone(defaultCapabilities), "CAP_SYS_ADMIN")
	for _, tt := range []struct {
		caps []string
		call string
		args []uint64
		want string
	}{
		{nil, "read", nil, "allow"},
		{nil, "socket", []uint64{1}, "allow"},
		{nil, "socket", []uint64{2}, "allow"},
		{nil, "socket", []uint64{10}, "allow"},
		{nil, "socket", []uint64{16}, "allow"},
		{nil, "socket", []uint64{38}, "EPERM"},
		{nil, "socket", []uint64{39}, "allow"},
		{nil, "socket", []uint64{40}, "EPERM"},
		{nil, "socket", []uint64{41}, "allow"},
		{admin, "socket", []uint64{38}, "EPERM"},
		{nil, "socketcall", nil, "ENOSYS"},
		{nil, "clone", []uint64{thread}, "allow"},
		{nil, "clone", []uint64{17}, "allow"},
		{nil, "clone", []uint64{0x10000000}, "EPERM"},
		{nil, "clone", []uint64{thread | 0x40000000}, "EPERM"},
		{nil, "clone3", nil, "ENOSYS"},
		{admin, "clone", []uint64{0x10000000}, "allow"},
		{admin, "clone3", nil, "allow"},
		{nil, "unshare", nil, "EPERM"},
		{admin, "unshare", nil, "allow"},
		{nil, "mount", nil, "EPERM"},
		{admin, "mount", nil, "allow"},
		{nil, "bpf", nil, "EPERM"},
		{[]string{"CAP_BPF"}, "bpf", nil, "allow"},
		{defaultCapabilities, "chroot", nil, "allow"},
		{nil, "chroot", nil, "EPERM"},
		{nil, "keyctl", nil, "EPERM"},
		{nil, "io_uring_setup", nil, "EPERM"},
		{admin, "io_uring_setup", nil, "EPERM"},
		{nil, "userfaultfd", nil, "EPERM"},
		{nil, "personality", []uint64{0xffffffff}, "allow"},
		{nil, "personality", []uint64{0x40000}, "EPERM"},
		{admin, "kexec_load", nil, "EPERM"},
		{admin, "open_by_handle_at", nil, "EPERM"},
		{[]string{"CAP_DAC_READ_SEARCH"}, "open_by_handle_at", nil, "allow"},
	} {
		if got := decide(t, DefaultSeccomp(tt.caps, "amd64"), tt.call, tt.args...); got != tt.want {
			t.Errorf("%s%v with %v: %s, want %s", tt.call, tt.args, tt.caps, got, tt.want)
		}
	}
}

// TestDefaultSeccompIsConsistent: no call is both free and conditional, which would
// make the condition void.
func TestDefaultSeccompIsConsistent(t *testing.T) {
	for arch := range seccompArches {
		for _, caps := range [][]string{nil, defaultCapabilities, knownCapabilities} {
			rules := map[string]int{}
			for i, r := range DefaultSeccomp(caps, arch).Syscalls {
				for _, name := range r.Names {
					if first, seen := rules[name]; seen && (len(r.Names) > 1 || first == 1) {
						t.Errorf("%s: %s is in rules %d and %d", arch, name, first, i)
					}
					rules[name] = i
				}
			}
		}
	}
}

func TestParseSeccomp(t *testing.T) {
	file := func(s string) string { return `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[` + s + `]}` }
	for _, tt := range []struct{ name, in, err string }{
		{"smallest", `{"defaultAction":"SCMP_ACT_ERRNO"}`, ""},
		{"comments", `{"defaultAction":"SCMP_ACT_LOG","comment":"x","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","comment":"y"}]}`, ""},
		{"rule", file(`{"names":["chmod"],"action":"SCMP_ACT_ERRNO","errnoRet":13,"args":[{"index":1,"value":1,"valueTwo":2,"op":"SCMP_CMP_MASKED_EQ"}]}`), ""},
		{"empty", ``, "byte 0"},
		{"null", `null`, `defaultAction ""`},
		{"array", `[]`, "cannot unmarshal"},
		{"two", `{"defaultAction":"SCMP_ACT_ALLOW"} {}`, "more after its end"},
		{"no default", `{}`, `defaultAction ""`},
		{"default", `{"defaultAction":"ALLOW"}`, `defaultAction "ALLOW"`},
		{"notify", `{"defaultAction":"SCMP_ACT_NOTIFY"}`, `"SCMP_ACT_NOTIFY"`},
		{"docker form", `{"defaultAction":"SCMP_ACT_ALLOW","archMap":[]}`, `"archMap"`},
		{"docker rule", file(`{"names":["a"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["X"]}}`), `"includes"`},
		{"typo", `{"defaultAction":"SCMP_ACT_ALLOW","syscals":[]}`, `"syscals"`},
		{"listener", `{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}`, `listenerPath "/x"`},
		{"errno", `{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":4096}`, "defaultErrnoRet 4096: the limit is 4095"},
		{"architecture", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86","VAX"]}`, `architectures[1] "VAX"`},
		{"flag", `{"defaultAction":"SCMP_ACT_ALLOW","flags":["FAST"]}`, `flags[0] "FAST"`},
		{"no names", file(`{"names":["a"],"action":"SCMP_ACT_ALLOW"},{"action":"SCMP_ACT_ALLOW"}`), "syscalls[1].names: 0"},
		{"empty name", file(`{"names":["a",""],"action":"SCMP_ACT_ALLOW"}`), `syscalls[0].names[1] ""`},
		{"action", file(`{"names":["a"],"action":"DENY"}`), `syscalls[0].action "DENY"`},
		{"index", file(`{"names":["a"],"action":"SCMP_ACT_ALLOW","args":[{"index":6,"op":"SCMP_CMP_EQ"}]}`), "syscalls[0].args[0].index 6: the limit is 5"},
		{"operator", file(`{"names":["a"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"op":"="}]}`), `args[0].op "="`},
		{"rule errno", file(`{"names":["a"],"action":"SCMP_ACT_ERRNO","errnoRet":9999}`), "errnoRet 9999"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := ParseSeccomp([]byte(tt.in))
			wantErr(t, err, tt.err)
			if (p == nil) != (err != nil) {
				t.Errorf("profile %v beside error %v", p, err)
			}
		})
	}
}

// TestParseOwn: berth's own profile is a valid one.
func TestParseOwn(t *testing.T) {
	for _, name := range []string{"seccomp_amd64", "seccomp_arm64_all"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSeccomp(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParseSeccomp: a profile or an error, never both; a profile is valid in the
// same sense when it is written and read again.
func FuzzParseSeccomp(f *testing.F) {
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"]}`))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"args":[{"index":1,"value":18446744073709551615,"op":"SCMP_CMP_NE"}]}]}`))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":null,"flags":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseSeccomp(data)
		if (p == nil) == (err == nil) {
			t.Fatalf("profile %v, error %v", p, err)
		}
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error %v is not ErrInvalid", err)
			}
			return
		}
		out, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSeccomp(out); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	})
}
