package sandbox

import (
	"bytes"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
)

// netDev are the counters of a network interface.
type netDev struct {
	name   string
	rx, tx netCounters
}

type netCounters struct{ bytes, packets, errors, dropped uint64 }

// defaultInterface is what a pod's interface is called, by every network plugin.
const defaultInterface = "eth0"

// Bounds of what is read of a pod's interfaces, whose number and names the pod's
// own processes may change.
const (
	maxNetDevText = 64 << 10
	maxNetDevs    = 64
)

// networks reads the interfaces of pods, by pod. What cannot be read is left out:
// a pod may be stopped just now.
func (s *Service) networks(pods []*pod) (map[string][]netDev, error) {
	ids := make([]string, 0, len(pods))
	for _, p := range pods {
		if !p.HostNetwork && p.State == StateReady {
			ids = append(ids, p.ID)
		}
	}
	out := make(map[string][]netDev, len(ids))
	buf := make([]byte, maxNetDevText)
	err := s.deps.Pins.Each(ids, netns.Net, func(id string) {
		text, err := readHere(buf)
		if err != nil {
			return
		}
		if devs, err := parseNetDev(text); err == nil {
			out[id] = devs
		}
	})
	return out, err
}

// readHere reads the interfaces of the calling thread's namespace. It uses plain
// system calls, as the thread is not one to be shared.
func readHere(buf []byte) ([]byte, error) {
	fd, err := unix.Open("/proc/thread-self/net/dev", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for n := 0; n < len(buf); {
		m, err := unix.Read(fd, buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return buf[:n], err
		}
		n += m
	}
	return buf, nil // the last line is cut, and left out
}

// parseNetDev reads the text of proc_pid_net(5), dev: two lines of headings, then
// a line for each interface with a name, eight numbers on what was received and
// eight on what was sent. The loopback interface is left out, as the kubelet's own
// reader does.
func parseNetDev(text []byte) ([]netDev, error) {
	var out []netDev
	at := 0
	for line := range bytes.Lines(text) {
		at++
		if at <= 2 || len(out) == maxNetDevs || !bytes.HasSuffix(line, []byte("\n")) {
			continue
		}
		colon := bytes.LastIndexByte(line, ':') // a name may have one, too
		if colon < 0 {
			return nil, fmt.Errorf("interfaces: line %d: no name", at)
		}
		d := netDev{name: string(bytes.TrimSpace(line[:colon]))}
		if d.name == "lo" {
			continue
		}
		v, err := numbers(line[colon+1:])
		if err != nil {
			return nil, fmt.Errorf("interfaces: line %d: %w", at, err)
		}
		d.rx = netCounters{v[0], v[1], v[2], v[3]}
		d.tx = netCounters{v[8], v[9], v[10], v[11]}
		out = append(out, d)
	}
	return out, nil
}

// numbers reads the sixteen counters of a line.
func numbers(b []byte) (v [16]uint64, err error) {
	f := bytes.Fields(b)
	if len(f) < len(v) {
		return v, fmt.Errorf("%d numbers, want %d", len(f), len(v))
	}
	for i := range v {
		if v[i], err = strconv.ParseUint(string(f[i]), 10, 64); err != nil {
			return v, err
		}
	}
	return v, nil
}
