package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

const (
	fallbackName   = "berth"
	fallbackBridge = "berth0"
	// fallbackVersion is the newest that plugins of distributions of 2023 speak.
	fallbackVersion = "1.0.0"
	// fallbackHostBits are the fewest bits for hosts: network, gateway, one pod
	// and broadcast.
	fallbackHostBits = 2
)

// fallbackNetwork is the configuration for a node that has none: a bridge whose
// address is the pods' gateway, masquerading, addresses from the subnet, and
// host ports.
func fallbackNetwork(subnet, dataDir string) (*network, error) {
	conf, err := fallbackConf(subnet, dataDir)
	if err != nil {
		return nil, err
	}
	n, err := parseNetwork(conf)
	if err != nil {
		return nil, err
	}
	n.fallback = true
	return n, nil
}

// fallbackConf renders it. It is pure.
func fallbackConf(subnet, dataDir string) ([]byte, error) {
	p, err := netip.ParsePrefix(subnet)
	if err != nil {
		return nil, fmt.Errorf("%w: FallbackSubnet: %q is no CIDR such as 10.88.0.0/16", ErrInvalid, subnet)
	}
	if p != p.Masked() {
		return nil, fmt.Errorf("%w: FallbackSubnet: %q has bits set behind the prefix, want %s", ErrInvalid, subnet, p.Masked())
	}
	if most := p.Addr().BitLen() - fallbackHostBits; p.Bits() > most || p.Bits() < 1 {
		return nil, fmt.Errorf("%w: FallbackSubnet: %q: prefix length %d, want 1 to %d", ErrInvalid, subnet, p.Bits(), most)
	}
	everywhere := "0.0.0.0/0"
	if p.Addr().Is6() {
		everywhere = "::/0"
	}
	type object = map[string]any
	return json.MarshalIndent(object{
		"cniVersion": fallbackVersion,
		"name":       fallbackName,
		"plugins": []object{{
			"type":        "bridge",
			"bridge":      fallbackBridge,
			"isGateway":   true,
			"ipMasq":      true,
			"hairpinMode": true, // a pod reaches itself by its own host port
			"ipam": object{
				"type":    "host-local",
				"dataDir": dataDir,
				"ranges":  [][]object{{{"subnet": p.String()}}},
				"routes":  []object{{"dst": everywhere}},
			},
		}, {
			"type":         "portmap",
			"capabilities": object{"portMappings": true},
		}},
	}, "", "  ")
}
