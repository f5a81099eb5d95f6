package sandbox

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/store"
)

// idKey marks the IDs that a berthd with this state directory makes: their last digits
// are a keyed sum of the others. So a thing that bears an ID somewhere that other
// runtimes use as well, a rule of iptables, an address, a control group, tells whose
// it is when no row does any more. The zero key is one like others.
type idKey struct {
	secret   [16]byte
	stateDir string // a copy of a state directory makes other IDs
	node     string // and so does one on another machine
}

const (
	metaIDKey   = "id-key" // in the book, hexadecimal
	idDigits    = 64       // the form that log collectors expect in the names of log files
	idSumDigits = 16
)

// openIDKey reads the key from the book. If there is none a new one is made, and
// written if the book can be written: without, nothing made before is recognized.
func openIDKey(st *store.Store, stateDir string) (idKey, error) {
	k := idKey{stateDir: stateDir, node: nodeMark(stateDir)}
	text, err := st.Meta(metaIDKey)
	if b, e := hex.DecodeString(text); err == nil && e == nil && len(b) == len(k.secret) {
		copy(k.secret[:], b)
		return k, nil
	}
	rand.Read(k.secret[:]) // never fails (crypto/rand, Go 1.24)
	if err := st.SetMeta(metaIDKey, hex.EncodeToString(k.secret[:])); err != nil {
		return k, fmt.Errorf("key of IDs: %w", err)
	}
	return k, nil
}

// newID returns 64 hexadecimal digits, at random but for the sum at their end.
func (k idKey) newID() string {
	var b [(idDigits - idSumDigits) / 2]byte
	rand.Read(b[:])
	text := hex.EncodeToString(b[:])
	return text + k.sum(text)
}

// made tells whether newID has made the ID. Those of berth before it had keys are
// not recognized.
func (k idKey) made(id string) bool {
	return validID(id) && hmac.Equal([]byte(k.sum(id[:idDigits-idSumDigits])), []byte(id[idDigits-idSumDigits:]))
}

func (k idKey) sum(text string) string {
	h := hmac.New(sha256.New, k.secret[:])
	h.Write([]byte(text + k.stateDir + k.node))
	return hex.EncodeToString(h.Sum(nil))[:idSumDigits]
}

// nodeMark tells a node from its clones, as of an image of a disk with a book on it, and
// stays over reboots: what the operating system and the machine call themselves, and
// where a file system has the state directory. What cannot be told is left out.
func nodeMark(stateDir string) string {
	mark := ""
	for _, file := range []string{"/etc/machine-id", "/sys/class/dmi/id/product_uuid"} { // machine-id(5); the firmware's, SMBIOS 7.2.1
		b, _ := readBounded(file, 256)
		mark += "\n" + strings.TrimSpace(string(b))
	}
	var st unix.Stat_t
	if unix.Stat(stateDir, &st) == nil { // its device's number may change with a reboot
		mark += fmt.Sprintf("\n%d", st.Ino)
	}
	return mark
}
