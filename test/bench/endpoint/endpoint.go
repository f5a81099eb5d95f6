// Package endpoint is what the benchmark programs have in common.
//
// Nouns: an [Endpoint] is a CRI socket with the daemon behind it; [Own] says how a
// berthd that a program starts for itself is to be. The rest reads what
// processes have used, makes one figure of many, and writes results down.
//
// Caveat: what /proc does not tell, because a process has just ended, counts as 0.
package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// dialLimit bounds how long an endpoint may take to tell its version.
const dialLimit = 20 * time.Second

// Endpoint is a CRI socket and the daemon that listens at it.
type Endpoint struct {
	Name    string
	Socket  string // its path
	Version string // name and version of the runtime, by its own word
	Client  *node.Client
	Pid     int // of the daemon
}

// List is a value for flag.Func: it adds "name=address" to all.
func List(all *[]string) func(string) error {
	return func(v string) error {
		if name, address, ok := strings.Cut(v, "="); !ok || name == "" || address == "" {
			return errors.New("want name=address")
		}
		*all = append(*all, v)
		return nil
	}
}

// Dial connects to "name=address", where address is the path of a socket or
// begins with unix://. Close what is returned.
func Dial(ctx context.Context, nameAndAddress string) (*Endpoint, error) {
	name, address, _ := strings.Cut(nameAndAddress, "=")
	e := &Endpoint{Name: name, Socket: strings.TrimPrefix(address, "unix://")}
	if err := e.Connect(ctx); err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", nameAndAddress, err)
	}
	return e, nil
}

// Connect connects anew, to a daemon that may be another one than before, and
// asks who it is.
func (e *Endpoint) Connect(ctx context.Context) error {
	c, err := node.Dial(e.Socket, nil)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	v, err := c.Version(ctx, &runtime.VersionRequest{})
	if err != nil {
		return errors.Join(err, c.Close())
	}
	pid, err := listener(e.Socket)
	if err != nil {
		return errors.Join(err, c.Close())
	}
	old := e.Client
	e.Version, e.Client, e.Pid = v.RuntimeName+" "+v.RuntimeVersion, c, pid
	if old != nil {
		return old.Close()
	}
	return nil
}

// Close drops the connection.
func (e *Endpoint) Close() error { return e.Client.Close() }

// listener returns the process that listens at a unix socket.
func listener(socket string) (int, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, inner); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// Own is a berthd of the program's own.
type Own struct {
	Dir        string   // holds its state, and its programs if they are built; exists
	Bin        string   // directory of its programs; "" builds them
	Config     string   // TOML put into its configuration
	Registries []string // host:port of registries that speak plain HTTP
	// RegistriesConf is a registries.conf that stands in place of one for them.
	RegistriesConf string
	CNI            string // node.Options.CNI
	Subnet         string // node.Options.Subnet
}

// Start starts it. The node is to be closed also when it comes with an error; it
// is nil if there is nothing to close.
func (o Own) Start(ctx context.Context) (*node.Node, error) {
	bin := o.Bin
	if bin == "" {
		root, err := node.Root()
		if err != nil {
			return nil, err
		}
		if bin, err = node.Build(ctx, root, o.Dir); err != nil {
			return nil, err
		}
	}
	n, err := node.New(node.Options{Bin: bin, CNI: o.CNI, Subnet: o.Subnet, Registries: o.Registries, RegistriesConf: o.RegistriesConf,
		Config: fmt.Sprintf("state_dir = %q\n%s", filepath.Join(o.Dir, "state"), o.Config), Without: []string{"state_dir"}})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return n, n.Start(ctx)
}

// Quantile returns the value below which a share q, 0 to 1, of v lies, between
// two values in proportion; 0.5 is the median. 0 for no values.
func Quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	at := q * float64(len(s)-1)
	low := int(math.Floor(at))
	if low+1 >= len(s) {
		return s[len(s)-1]
	}
	return s[low] + (s[low+1]-s[low])*(at-float64(low))
}

// WriteJSON writes v to a file; "-" is standard output, "" nowhere.
func WriteJSON(to string, v any) error {
	if to == "" {
		return nil
	}
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	if text = append(text, '\n'); to == "-" {
		_, err = os.Stdout.Write(text)
		return err
	}
	return os.WriteFile(to, text, 0o644)
}
