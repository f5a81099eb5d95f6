// Package layer turns the stream of one image layer into a directory that
// overlay can use as a lower layer.
//
// # Vocabulary
//
//   - stream: a layer as a registry sends it; Open verifies its digest,
//     decompresses it and verifies the diff ID, the digest of the tar archive inside.
//   - entry: one member of the archive. Later entries win over earlier ones.
//   - whiteout: an entry ".wh.<name>", which hides <name> of the layers below and
//     becomes a character device 0/0; ".wh..wh..opq" makes its directory opaque
//     (OCI image-spec, layer.md, "Whiteouts").
//   - implied directory: one that entries use as a parent and that the archive does
//     not list. It is made 0755 root:root and reported, so that the caller can give it
//     the metadata that it has in the layers below.
//
// # Manifest
//
// Apply can write down what it makes (Options.Manifest): each path with type, owner, mode,
// time, attributes, link target and a hash of its contents. Verify compares a directory
// with that list. The hash is XXH64: it finds damage, and costs a tenth of what SHA-256
// does. It is no protection from somebody who writes into the layer on purpose, as nothing
// is that lies on the same disk.
//
// # Safety
//
// Nothing in an archive is trusted. Every path is resolved by the kernel inside the
// root (openat2 with RESOLVE_IN_ROOT), the last component never follows a link, and
// bytes and entries are bounded. What an archive can do is limited to the root; the
// root must be in a directory that only root can enter, since setuid files and device
// nodes appear in it.
//
// # Caveats
//
//   - It needs Linux 5.6 (openat2) and root.
//   - Nothing is synced; an error leaves the root half filled, to be thrown away.
//   - Of extended attributes only user.*, security.capability and POSIX ACLs are kept.
//     Those of overlay itself are dropped: an archive must not speak for the file system.
package layer

import (
	"errors"
	"fmt"
	"io"
)

// Errors, tested with errors.Is. The text names the entry.
var (
	// ErrUnsafe: a name or link that would leave the root, or is no name at all.
	ErrUnsafe = errors.New("unsafe layer entry")
	// ErrTooLarge: more bytes or entries than Options allow.
	ErrTooLarge = errors.New("layer too large")
	// ErrUnsupported: an entry type or a compression that is not known.
	ErrUnsupported = errors.New("layer format not supported")
	// ErrCorrupt: not a tar archive, or not a valid compressed stream.
	ErrCorrupt = errors.New("layer corrupt")
	// ErrDigest: the stream is not what its digest or diff ID says.
	ErrDigest = errors.New("layer digest mismatch")
)

// Options bound what a layer may take.
type Options struct {
	// MaxBytes bounds the contents of all files, holes included; 0 is no bound.
	MaxBytes int64
	// MaxEntries bounds the number of entries and of directories they imply; 0 is
	// no bound.
	MaxEntries int64
	// Manifest, if not nil, gets a list of what the layer holds, for Verify: some 40
	// bytes for an entry. It is complete only when Apply returned no error.
	Manifest io.Writer
}

// Result tells what Apply made.
type Result struct {
	// Size is an estimate of the bytes on disk: contents rounded up to 4 KiB.
	Size int64
	// Inodes counts what was created, links to the same file once.
	Inodes int64
	// Entries is the number of archive entries.
	Entries int64
	// Implied lists the implied directories, parents first, relative to the root.
	Implied []string
	// OpaqueRoot tells that the layer hides all that is below it.
	OpaqueRoot bool
	// DroppedXattrs counts extended attributes that were not kept.
	DroppedXattrs int64
}

// entryError adds the name of an entry, which may be long and full of anything.
func entryError(name string, err error) error {
	return fmt.Errorf("layer entry %q: %w", clip(name), err)
}
