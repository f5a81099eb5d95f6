package cni

import (
	"fmt"
	"math/big"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// Pod is what a plugin may learn of a pod.
type Pod struct {
	// ID names the attachment (CNI_CONTAINERID): letters, digits, "_.-", at most
	// 128 of them, beginning with a letter or digit.
	ID string
	// Name, Namespace and UID are the Kubernetes identity (CNI_ARGS).
	Name, Namespace, UID string
	// NetNS is the path of the pinned network namespace. Attach requires it;
	// Detach does without when it is "" or no namespace any more.
	NetNS string
	// CgroupPath is given to plugins with the cgroupPath capability.
	CgroupPath string
	// PortMappings with HostPort 0 are ignored, as in Kubernetes.
	PortMappings []PortMapping
	// Annotations kubernetes.io/ingress-bandwidth and egress-bandwidth are read,
	// in bits per second, for plugins with the bandwidth capability.
	Annotations map[string]string
	// DNS is given to plugins with the dns capability.
	DNS DNS
}

// PortMapping publishes a port of the pod on the node.
type PortMapping struct {
	Protocol      string // TCP, UDP or SCTP in any case; "" is TCP
	ContainerPort int32  // 1 to 65535
	HostPort      int32  // 0 (none) to 65535
	HostIP        string // "" for every address of the node
}

// DNS is the pod's resolver configuration.
type DNS struct {
	Servers, Searches, Options []string
}

// The annotations that Kubernetes documents for traffic shaping.
const (
	ingressBandwidth = "kubernetes.io/ingress-bandwidth"
	egressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// Limits of a Pod's fields.
const (
	maxIDLen        = 128
	maxArgLen       = 253 // a Kubernetes name
	maxPortMappings = 1024
	maxPort         = 65535
)

var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// checkID holds the pattern that CNI demands of a container ID, which is also
// safe as a file name.
func checkID(id string) error {
	if len(id) > maxIDLen {
		return fmt.Errorf("%w: pod ID: %d bytes, at most %d", ErrInvalid, len(id), maxIDLen)
	}
	if !idPattern.MatchString(id) {
		return fmt.Errorf("%w: pod ID: %q, want letters, digits and _.-", ErrInvalid, id)
	}
	return nil
}

// label names the pod in errors.
func (p Pod) label() string {
	id := p.ID[:min(len(p.ID), 13)]
	if p.Name == "" && p.Namespace == "" {
		return "pod " + id
	}
	return fmt.Sprintf("pod %s/%s (%s)", p.Namespace, p.Name, id)
}

// runtimeConf translates the pod into libcni's terms; it is where every field is
// checked. It is pure.
func (p Pod) runtimeConf() (*libcni.RuntimeConf, error) {
	if err := checkID(p.ID); err != nil {
		return nil, err
	}
	args, err := p.args()
	if err != nil {
		return nil, err
	}
	caps, err := p.capabilities()
	if err != nil {
		return nil, err
	}
	return &libcni.RuntimeConf{
		ContainerID:    p.ID,
		NetNS:          p.NetNS,
		IfName:         ifName,
		Args:           args,
		CapabilityArgs: caps,
	}, nil
}

// args is CNI_ARGS. Its grammar, K=V joined by ";", has no escape, so a value
// with one of its signs could speak for another key.
func (p Pod) args() ([][2]string, error) {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
	for _, kv := range args {
		if len(kv[1]) > maxArgLen {
			return nil, fmt.Errorf("%w: %s: %d bytes, at most %d", ErrInvalid, kv[0], len(kv[1]), maxArgLen)
		}
		for _, r := range kv[1] {
			if r == ';' || r == '=' || r < ' ' || r == 0x7f {
				return nil, fmt.Errorf("%w: %s: %q contains %q", ErrInvalid, kv[0], kv[1], r)
			}
		}
	}
	return args, nil
}

// capabilities are the arguments that plugins get if their configuration
// declares the capability (CNI conventions, "Dynamic Plugin specific Fields").
func (p Pod) capabilities() (map[string]any, error) {
	caps := map[string]any{}
	ports, err := p.portMappings()
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 {
		caps["portMappings"] = ports
	}
	bw, err := p.bandwidth()
	if err != nil {
		return nil, err
	}
	if len(bw) > 0 {
		caps["bandwidth"] = bw
	}
	if d := p.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		caps["dns"] = map[string][]string{"servers": d.Servers, "searches": d.Searches, "options": d.Options}
	}
	if p.CgroupPath != "" {
		caps["cgroupPath"] = p.CgroupPath
	}
	return caps, nil
}

// portMap is one element of the portMappings capability.
type portMap struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

func (p Pod) portMappings() ([]portMap, error) {
	if len(p.PortMappings) > maxPortMappings {
		return nil, fmt.Errorf("%w: port mappings: %d of them, at most %d", ErrInvalid, len(p.PortMappings), maxPortMappings)
	}
	var out []portMap
	for i, m := range p.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		bad := func(field string, value any, want string) error {
			return fmt.Errorf("%w: port mapping %d: %s: %v, want %s", ErrInvalid, i, field, value, want)
		}
		if m.HostPort < 0 || m.HostPort > maxPort {
			return nil, bad("host port", m.HostPort, "0 to 65535")
		}
		if m.ContainerPort < 1 || m.ContainerPort > maxPort {
			return nil, bad("container port", m.ContainerPort, "1 to 65535")
		}
		proto := strings.ToLower(m.Protocol)
		switch proto {
		case "":
			proto = "tcp"
		case "tcp", "udp", "sctp":
		default:
			return nil, bad("protocol", strconv.Quote(m.Protocol), "TCP, UDP or SCTP")
		}
		if m.HostIP != "" {
			if a, err := netip.ParseAddr(m.HostIP); err != nil || a.Zone() != "" {
				return nil, bad("host IP", strconv.Quote(m.HostIP), "an address")
			}
		}
		out = append(out, portMap{m.HostPort, m.ContainerPort, proto, m.HostIP})
	}
	return out, nil
}

// bandwidth is the bandwidth capability; rates and bursts are in bits.
func (p Pod) bandwidth() (map[string]uint64, error) {
	out := map[string]uint64{}
	for annotation, prefix := range map[string]string{ingressBandwidth: "ingress", egressBandwidth: "egress"} {
		value, ok := p.Annotations[annotation]
		if !ok {
			continue
		}
		rate, err := parseRate(value)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %w", annotation, err)
		}
		out[prefix+"Rate"], out[prefix+"Burst"] = rate, burst(rate)
	}
	return out, nil
}

// The rates that Kubernetes accepts in the annotations, in bits per second.
const (
	minRate = 1_000
	maxRate = 1_000_000_000_000_000
)

// burst is the bucket of the shaper: a tenth of a second of traffic, but no less
// than a few of the largest segments that an interface hands over at once, and
// no more than the 32 bits that the plugin has for it.
func burst(rate uint64) uint64 {
	const least, most = 4 << 20, 1<<32 - 1
	return min(max(rate/10, least), most)
}

var (
	ratePattern = regexp.MustCompile(`^([0-9]{1,19}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:[eE](\+?[0-9]{1,2})|([a-zA-Z]{1,2}))?$`)
	rateSuffix  = map[string]int64{
		"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
	}
)

// parseRate reads a Kubernetes quantity as bits per second. Suffixes below 1 and
// above P cannot be in range and are not known. Fractions of a bit are cut off.
func parseRate(s string) (uint64, error) {
	m := ratePattern.FindStringSubmatch(s)
	bad := func(why string) error {
		return fmt.Errorf("%w: bandwidth %q: %s, want a quantity of 1k to 1P bits per second", ErrInvalid, clip(s), why)
	}
	if m == nil {
		return 0, bad("no quantity")
	}
	v, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return 0, bad("no number")
	}
	factor, ok := rateSuffix[m[3]]
	if !ok {
		return 0, bad("unknown suffix " + m[3])
	}
	v.Mul(v, new(big.Rat).SetInt64(factor))
	if m[2] != "" {
		exp, err := strconv.ParseUint(strings.TrimPrefix(m[2], "+"), 10, 8)
		if err != nil {
			return 0, bad("no exponent")
		}
		v.Mul(v, new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(10), new(big.Int).SetUint64(exp), nil)))
	}
	n := new(big.Int).Quo(v.Num(), v.Denom())
	if !n.IsUint64() || n.Uint64() < minRate || n.Uint64() > maxRate {
		return 0, bad("out of range")
	}
	return n.Uint64(), nil
}
