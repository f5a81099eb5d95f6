package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// TestPeers: the other end of a veth pair is named, and neither the loopback
// interface nor what is in no pin.
func TestPeers(t *testing.T) {
	p := mustPins(t)
	if err := p.Create(t.Context(), "a", []Kind{Net}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Destroy("a") })
	if got, err := p.Peers("a"); err != nil || len(got) != 0 {
		t.Errorf("an empty namespace: %q, %v", got, err)
	}
	if _, err := p.Peers("none"); !errors.Is(err, ErrNotPinned) {
		t.Errorf("no namespace: %v, want ErrNotPinned", err)
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip(8) to make interfaces")
	}
	here := fmt.Sprintf("bt%dp", os.Getpid()%100000)
	err := p.Do("a", Net, func() error {
		// The thread's namespace is the command's.
		out, err := exec.Command("ip", "link", "add", "eth0", "type", "veth", "peer", "name", here, "netns", fmt.Sprint(os.Getpid())).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Peers("a"); err != nil || !slices.Equal(got, []string{here}) {
		t.Errorf("peers %q, %v; want %s", got, err, here)
	}
}
