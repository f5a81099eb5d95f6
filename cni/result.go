package cni

import (
	"encoding/json"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// Limits of a result.
const (
	maxAddresses = 64
	maxRawResult = 64 << 10
)

// Result is where a pod is on the network.
type Result struct {
	// IPs are the pod's addresses without prefix length, in the plugin's order;
	// the first is the primary one. There is one at least and 64 at most.
	IPs []string
	// Interface is the name of the pod's interface.
	Interface string
	// Raw is the plugin's result, in the newest version of the specification;
	// 64 KiB at most.
	Raw json.RawMessage
}

// newResult picks the pod's addresses out of a plugin's result. It is pure.
//
// An address belongs to the pod if its interface is inside a sandbox (CNI spec,
// "Success"); of several such interfaces, the one that was asked for counts
// alone. Results before 0.3.0 name no interface and speak of that one only.
func newResult(res types.Result) (Result, error) {
	r, err := types100.NewResultFromResult(res)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrBadResult, err)
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrBadResult, err)
	}
	if len(raw) > maxRawResult {
		return Result{}, fmt.Errorf("%w: %d bytes, at most %d", ErrBadResult, len(raw), maxRawResult)
	}
	var asked, other []string
	for i, ip := range r.IPs {
		addr := ip.Address.IP.String()
		if len(ip.Address.IP) == 0 {
			return Result{}, fmt.Errorf("%w: ips[%d]: no address", ErrBadResult, i)
		}
		if ip.Interface == nil {
			asked = append(asked, addr)
			continue
		}
		if *ip.Interface < 0 || *ip.Interface >= len(r.Interfaces) {
			return Result{}, fmt.Errorf("%w: ips[%d]: interface %d of %d", ErrBadResult, i, *ip.Interface, len(r.Interfaces))
		}
		switch dev := r.Interfaces[*ip.Interface]; {
		case dev.Sandbox == "":
		case dev.Name == ifName:
			asked = append(asked, addr)
		default:
			other = append(other, addr)
		}
	}
	if len(asked) == 0 {
		asked = other
	}
	if len(asked) == 0 || len(asked) > maxAddresses {
		return Result{}, fmt.Errorf("%w: %d addresses for the pod, want 1 to %d", ErrBadResult, len(asked), maxAddresses)
	}
	return Result{IPs: asked, Interface: ifName, Raw: raw}, nil
}
