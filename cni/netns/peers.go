package netns

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Peers names the interfaces of this process's network namespace whose other ends
// are in the pinned one of an ID: veth pairs, for example. They go with that.
// ErrNotPinned if there is none.
func (p *Pins) Peers(id string) ([]string, error) {
	var links map[int]int // by the index of the peer, that of the interface
	err := p.Do(id, Net, func() (err error) {
		links, err = linksHere()
		return err
	})
	if err != nil {
		return nil, err
	}
	var names []string
	for peer, inside := range links {
		// The index may be one of a third namespace: ask back.
		i, err := net.InterfaceByIndex(peer)
		if err != nil {
			continue
		}
		text, err := os.ReadFile("/sys/class/net/" + i.Name + "/iflink")
		if n, e := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && e == nil && n == inside && peer != inside {
			names = append(names, i.Name)
		}
	}
	return names, nil
}

// linksHere reads which interfaces of the calling thread's namespace have their
// other end in another one (rtnetlink(7), IFLA_LINK with IFLA_LINK_NETNSID).
func linksHere() (map[int]int, error) {
	rib, err := syscall.NetlinkRIB(unix.RTM_GETLINK, unix.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("interfaces: %w", err)
	}
	messages, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return nil, fmt.Errorf("interfaces: %w", err)
	}
	links := map[int]int{}
	for i := range messages {
		m := &messages[i]
		if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(m)
		if err != nil {
			return nil, fmt.Errorf("interfaces: %w", err)
		}
		inside, peer, elsewhere := int(int32(binary.NativeEndian.Uint32(m.Data[4:8]))), 0, false
		for _, a := range attrs {
			switch a.Attr.Type {
			case unix.IFLA_LINK:
				if len(a.Value) == 4 {
					peer = int(binary.NativeEndian.Uint32(a.Value))
				}
			case unix.IFLA_LINK_NETNSID:
				elsewhere = true
			}
		}
		if elsewhere && peer != 0 {
			links[peer] = inside
		}
	}
	return links, nil
}
