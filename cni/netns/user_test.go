package netns

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func mustUser(t *testing.T) UserSpec {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("needs sleep")
	}
	m := []IDMap{{Inside: 0, Outside: 100000, Length: 65536}}
	return UserSpec{UIDs: m, GIDs: m, Holder: []string{sleep, "600"}}
}

// inUser runs a shell script as the root of pinned namespaces.
func inUser(t *testing.T, p *Pins, id, script string) string {
	t.Helper()
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		t.Skip("needs nsenter (Debian: util-linux)")
	}
	out, err := exec.Command(nsenter, "--user="+p.Path(id, User), "--net="+p.Path(id, Net), "--ipc="+p.Path(id, IPC), "--uts="+p.Path(id, UTS),
		"sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

func TestCreateIn(t *testing.T) {
	p := mustPins(t)
	var seen uint64
	err := p.CreateIn(t.Context(), "a", mustUser(t), []Kind{Net, IPC, UTS}, func() error {
		seen = mustInode(t, "/proc/thread-self/ns/net")
		return errors.Join(LoopbackUp(), unix.Sethostname([]byte("inside")))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []Kind{Net, IPC, UTS, User} {
		if !p.Pinned("a", k) {
			t.Errorf("%s: not pinned", k)
		}
	}
	if seen != mustInode(t, p.Path("a", Net)) || seen == mustInode(t, "/proc/self/ns/net") {
		t.Error("setup did not run in the pinned network namespace")
	}
	// Its root may change what belongs to its namespaces: it owns them.
	got := inUser(t, p, "a", "cat /proc/self/uid_map /proc/self/setgroups; hostname; hostname other && hostname; ip link set lo down && echo linked")
	if f := strings.Fields(got); len(f) != 7 || f[0] != "0" || f[1] != "100000" || f[2] != "65536" || f[3] != "allow" || f[4] != "inside" || f[5] != "other" || f[6] != "linked" {
		t.Errorf("inside: %q", got)
	}
	if stray := strayThreads(t); len(stray) > 0 {
		t.Errorf("threads left inside: %v", stray)
	}
	if err := p.Destroy("a"); err != nil || p.Pinned("a", User) {
		t.Errorf("destroy: %v", err)
	}
}

func TestCreateInAlone(t *testing.T) {
	p := mustPins(t)
	if err := p.CreateIn(t.Context(), "a", mustUser(t), nil, nil); err != nil || !p.Pinned("a", User) {
		t.Fatal(err)
	}
	if err := p.Do("a", User, func() error { return nil }); !errors.Is(err, ErrKind) {
		t.Errorf("Do: %v, want ErrKind", err)
	}
	if err := p.Create(t.Context(), "b", []Kind{User}, nil); !errors.Is(err, ErrKind) {
		t.Errorf("Create: %v, want ErrKind", err)
	}
}

func TestCreateInFails(t *testing.T) {
	p := mustPins(t)
	user := mustUser(t)
	ended, cancel := context.WithCancel(t.Context())
	boom := errors.New("boom")
	for name, fn := range map[string]func() error{
		"setup":     func() error { return p.CreateIn(t.Context(), "a", user, []Kind{Net}, func() error { return boom }) },
		"end":       func() error { return p.CreateIn(ended, "a", user, []Kind{Net}, func() error { cancel(); return nil }) },
		"no holder": func() error { return p.CreateIn(t.Context(), "a", UserSpec{UIDs: user.UIDs}, nil, nil) },
		"no program": func() error {
			return p.CreateIn(t.Context(), "a", UserSpec{UIDs: user.UIDs, GIDs: user.GIDs, Holder: []string{"/none"}}, nil, nil)
		},
		"mapping": func() error {
			twice := append(user.UIDs, user.UIDs...)
			return p.CreateIn(t.Context(), "a", UserSpec{UIDs: twice, GIDs: twice, Holder: user.Holder}, nil, nil)
		},
	} {
		if err := fn(); err == nil || name == "setup" && !errors.Is(err, boom) {
			t.Errorf("%s: %v", name, err)
		}
		if ids, err := p.List(); err != nil || len(ids) != 0 {
			t.Errorf("%s: left %v, %v", name, ids, err)
		}
	}
	if kids, err := os.ReadFile("/proc/thread-self/children"); err == nil && len(strings.Fields(string(kids))) > 0 {
		t.Errorf("holders left: %s", kids)
	}
}

func TestUserOpen(t *testing.T) {
	needRoot(t)
	f, err := mustUser(t).Open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Ino == mustInode(t, "/proc/self/ns/user") {
		t.Errorf("not a new namespace: %v", err)
	}
	if _, err := (UserSpec{}).Open(); err == nil {
		t.Error("opened without a holder")
	}
}
