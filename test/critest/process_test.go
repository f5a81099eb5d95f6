package critest

import (
	"fmt"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/registry"
)

// TestCommandAndArgs: how the configuration and the image make up the command
// line. The image Settings prints its arguments, the working directory and
// the user.
func TestCommandAndArgs(t *testing.T) {
	b := open(t)
	p := b.pod()
	const tail = "/srv/data\n1000\n"
	for _, c := range []struct {
		name          string
		command, args []string
		want          string
	}{
		{"neither: the image's entry point and command", nil, nil, "default\n" + tail},
		{"args replace the image's command", nil, []string{"a", "b c"}, "a b c\n" + tail},
		{"a command replaces both", []string{"/bin/echo", "x"}, nil, "x\n"},
		{"command and args", []string{"/bin/echo", "x"}, []string{"y", ""}, "x y \n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := p.with(t).output(c.command, b.image(images.Settings), func(cfg *runtime.ContainerConfig) { cfg.Args = c.args })
			if got != c.want {
				t.Errorf("printed %q, want %q", got, c.want)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	b := open(t)
	p := b.pod()
	env := p.output(sh("env"), b.image(images.Settings), func(cfg *runtime.ContainerConfig) {
		cfg.Envs = []*runtime.KeyValue{
			{Key: "BOTH", Value: []byte("config")}, {Key: "EMPTY"}, {Key: "EQUALS", Value: []byte("a=b=c")},
			{Key: "TWICE", Value: []byte("first")}, {Key: "TWICE", Value: []byte("last")}, {Key: "LINES", Value: []byte("one two")},
		}
	})
	lines := "\n" + env
	for _, want := range []string{"FROM_IMAGE=yes", "BOTH=config", "EMPTY=", "EQUALS=a=b=c", "TWICE=last", "LINES=one two", "PATH=/bin:/", "HOME=/home/app"} {
		if !strings.Contains(lines, "\n"+want+"\n") {
			t.Errorf("environment lacks %s: %q", want, env)
		}
	}
	if strings.Contains(lines, "BOTH=image") || strings.Contains(lines, "NOTIFY_SOCKET") {
		t.Errorf("environment has what it should not: %q", env)
	}
}

func TestWorkingDirectory(t *testing.T) {
	b := open(t)
	p := b.pod()
	in := func(dir string) edit { return func(c *runtime.ContainerConfig) { c.WorkingDir = dir } }
	if got := p.output([]string{"pwd"}, in("/tmp")); got != "/tmp\n" {
		t.Errorf("configured: %q", got)
	}
	if got := p.output([]string{"pwd"}); got != "/\n" {
		t.Errorf("neither configured nor in the image: %q", got)
	}
	if got := p.output([]string{"/bin/pwd"}, b.image(images.Settings), in("/made/on/demand")); got != "/made/on/demand\n" {
		t.Errorf("a directory that does not exist: %q", got)
	}
}

// ids runs "guest ids" in an image whose USER is user, with edits on top.
func (p *pod) idsAs(user string, edits ...edit) (string, error) {
	p.Helper()
	layer := p.images[images.Guest]
	img, err := layer.WithConfig(registry.Config{Entrypoint: []string{"/guest"}, User: user})
	p.must(err)
	repo := fmt.Sprintf("berth/user%d", containerNumber.Add(1))
	p.registry.Push(repo, images.Tag, img)
	ref := p.ref(repo)
	if _, err := p.client.Pull(p.ctx, ref); err != nil {
		return "", fmt.Errorf("pull: %w", err)
	}
	p.Cleanup(func() { p.dropImage(ref) })
	c, err := p.tryCreate([]string{"/guest", "ids"}, append([]edit{p.image(repo)}, edits...)...)
	if err != nil {
		return "", err
	}
	if _, err := p.client.StartContainer(p.ctx, &runtime.StartContainerRequest{ContainerId: c.id}); err != nil {
		return "", err
	}
	if st := c.wait(); st.ExitCode != 0 {
		return "", fmt.Errorf("exit code %d: %s", st.ExitCode, c.text())
	}
	return c.text(), nil
}

// TestImageUser: the forms of USER in an image without /etc/passwd. What is
// not a number in range must be refused and never end as user 0.
func TestImageUser(t *testing.T) {
	b := open(t)
	p := b.pod()
	for _, c := range []struct{ user, want string }{
		{"", "uid 0 euid 0 gid 0 groups [0]\n"},
		{"4242", "uid 4242 euid 4242 gid 0 groups [0]\n"},
		{"4242:4343", "uid 4242 euid 4242 gid 4343 groups [4343]\n"},
		{"0:0", "uid 0 euid 0 gid 0 groups [0]\n"},
	} {
		got, err := p.idsAs(c.user)
		// Whether the primary group is among the supplementary ones is left to the runtime.
		if err != nil || groupless(got) != groupless(c.want) {
			t.Errorf("USER %q: got %q, %v; want %q", c.user, got, err, c.want)
		}
	}
	if b.node == nil {
		return
	}
	for _, user := range []string{"2147483648", "4294967296", "1e30", "0:0x", "0x0", "+0", "-1", "1:-1", "nobody-knows", "1:2:3", "99999999999999999999", ":", "a b"} {
		if got, err := p.idsAs(user); err == nil {
			t.Errorf("USER %q ran as %q, want an error", user, got)
		} else if !strings.Contains(err.Error(), strings.TrimLeft(user[strings.Index(user, ":")+1:], " ")) {
			t.Errorf("USER %q: error does not name it: %v", user, err)
		}
	}
}

func groupless(s string) string { before, _, _ := strings.Cut(s, " groups"); return before }

// ids returns what "guest ids" prints in busybox with a security context.
func (p *pod) ids(fn func(*runtime.LinuxContainerSecurityContext), edits ...edit) string {
	p.Helper()
	return p.output([]string{"/guest", "ids"}, append(edits, security(fn))...)
}

func TestUser(t *testing.T) {
	b := open(t)
	p := b.pod()
	value := func(n int64) *runtime.Int64Value { return &runtime.Int64Value{Value: n} }
	for _, c := range []struct {
		name string
		fn   func(*runtime.LinuxContainerSecurityContext)
		want string // up to the groups
		has  []string
		not  []string
	}{
		{"number", func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = value(4242) }, "uid 4242 euid 4242 gid 0", nil, nil},
		{"number and group", func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsGroup = value(4242), value(4343) }, "uid 4242 euid 4242 gid 4343", nil, nil},
		{"number that /etc/passwd knows", func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = value(1000) }, "uid 1000 euid 1000 gid 1001", []string{"1500", "1501"}, nil},
		{"name", func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername = "app" }, "uid 1000 euid 1000 gid 1001", []string{"1500", "1501"}, []string{"1600"}},
		{"name and group", func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername, s.RunAsGroup = "app", value(77) }, "uid 1000 euid 1000 gid 77", nil, nil},
		{"merged groups", func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = value(1000), []int64{5000}
		}, "uid 1000 euid 1000 gid 1001", []string{"1500", "1501", "5000"}, nil},
		{"strict groups", func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = value(1000), []int64{5000}, runtime.SupplementalGroupsPolicy_Strict
		}, "uid 1000 euid 1000 gid 1001", []string{"5000"}, []string{"1500", "1501"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := p.with(t).ids(c.fn)
			if groupless(got) != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			groups := " " + strings.Trim(strings.TrimPrefix(got, groupless(got)+" groups "), "[]\n") + " "
			for _, g := range c.has {
				if !strings.Contains(groups, " "+g+" ") {
					t.Errorf("groups %q lack %s", groups, g)
				}
			}
			for _, g := range c.not {
				if strings.Contains(groups, " "+g+" ") {
					t.Errorf("groups %q have %s", groups, g)
				}
			}
		})
	}
	p.refuses(sh("id"), security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername = "nobody-knows" }), "nobody-knows")
}

// TestNumericUserIsNoName: /etc/passwd of the image has a root account whose
// name is 1234.
func TestNumericUserIsNoName(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	if got := p.ids(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = &runtime.Int64Value{Value: 1234} }); groupless(got) != "uid 1234 euid 1234 gid 0" {
		t.Errorf("user 1234: %q", got)
	}
	c, err := p.tryCreate([]string{"/guest", "ids"}, security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername = "1234" }))
	if err != nil {
		return // refusing is as safe
	}
	c.start()
	c.wait()
	if got := groupless(c.text()); !strings.HasPrefix(got, "uid 1234 ") {
		t.Errorf("user name 1234 ran as %q", got)
	}
}

func TestStatusTellsUser(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), security(func(s *runtime.LinuxContainerSecurityContext) {
		s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = &runtime.Int64Value{Value: 1000}, &runtime.Int64Value{Value: 4343}, []int64{5000}
	}))
	u := c.status().GetUser().GetLinux()
	groups := fmt.Sprint(u.GetSupplementalGroups())
	if u.GetUid() != 1000 || u.GetGid() != 4343 || !strings.Contains(groups, "5000") || !strings.Contains(groups, "1500") {
		t.Errorf("user %v, want 1000:4343 with 5000 and the image's 1500", u)
	}
	if got := c.exec("sh", "-c", "id -u; id -g"); got != "1000\n4343\n" {
		t.Errorf("exec runs as %q", got)
	}
}

// TestStopSignal: the configuration's signal comes before the image's, and
// the status tells the effective one.
func TestStopSignal(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run([]string{"/guest", "signals"}, b.image(images.Settings))
	if got := c.status().StopSignal; got != runtime.Signal_SIGNAL_SIGUSR1 {
		t.Errorf("status tells %v, want the image's SIGUSR1", got)
	}
	c = p.run([]string{"/guest", "signals"}, b.image(images.Settings), func(cfg *runtime.ContainerConfig) { cfg.StopSignal = runtime.Signal_SIGNAL_SIGUSR2 })
	if got := c.status().StopSignal; got != runtime.Signal_SIGNAL_SIGUSR2 {
		t.Errorf("status tells %v, want the configured SIGUSR2", got)
	}
	c.sees("ready")
	c.stop(1)
	if text := c.text(); !strings.Contains(text, "got SIGUSR2") {
		t.Errorf("log %q, want SIGUSR2", text)
	}
}

// TestImageVolumeDirectory: a directory that an image declares and does not have
// is there, and can be written.
func TestImageVolumeDirectory(t *testing.T) {
	b := open(t)
	got := b.pod().output(sh("stat -c '%F %a %u' /volume && echo x > /volume/f && cat /volume/f"), b.image(images.Settings), security(func(s *runtime.LinuxContainerSecurityContext) {
		s.RunAsUser = &runtime.Int64Value{Value: 0}
	}))
	if got != "directory 755 0\nx\n" {
		t.Errorf("/volume is %q", got)
	}
}
