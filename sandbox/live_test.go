package sandbox

import (
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/berthd/berth/shim"
)

// echoes is a shim that says hello as it is greeted, and nothing else.
func echoes(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return socket
}

// A connection that was made at the start takes no other's place, which somebody
// may be using; a later one of whoever needs it does.
func TestLiveConnections(t *testing.T) {
	socket := echoes(t)
	connect := func() *shim.Client {
		t.Helper()
		c, err := shim.Connect(t.Context(), socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	l := newLive()
	first := l.add("a", connect())
	if first == nil || l.get("a") != first {
		t.Fatal("the first connection is not taken")
	}
	late := connect()
	if l.add("a", late) != nil || l.get("a") != first || !first.alive() {
		t.Error("the second one took the place of one that works")
	}
	<-late.Gone()
	second := l.put("a", connect())
	if second == nil || l.get("a") != second {
		t.Error("put did not take the place of an older one")
	}
	<-first.client.Gone()
	second.client.Close()
	<-second.client.Gone()
	if third := l.add("a", connect()); third == nil || l.get("a") != third {
		t.Error("a connection that ended kept its place")
	}
	l.closeAll()
	if last := connect(); l.add("a", last) != nil {
		t.Error("taken at the end of the daemon")
	}
}
