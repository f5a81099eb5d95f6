package imageservice

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/berthd/berth/store"
)

// imageRow is an image in the book, under its ID. It is written only when all layers are
// durable, so a row is the proof that the image is whole.
type imageRow struct {
	Tags         []string    `json:",omitempty"` // sorted
	Digests      []string    `json:",omitempty"` // sorted
	Manifest     string      // digest of the manifest that lists the layers
	Layers       []layerRow  `json:",omitempty"` // base first
	Config       ImageConfig // what containers start from; all of it is in blobs
	OS           string      `json:",omitempty"`
	Architecture string      `json:",omitempty"`
	Variant      string      `json:",omitempty"`
	Created      time.Time
	Pulled       time.Time
	Size         uint64
	// Dropped: removed while a container used it. Invisible; its layers stay until
	// the container is gone.
	Dropped bool `json:",omitempty"`
	// Damaged: a check after a crash found a layer that is not whole. Invisible until it
	// is pulled again.
	Damaged bool `json:",omitempty"`
	// Pinned by Service.Pin. Image.Pinned may be set by a pattern as well.
	Pinned bool `json:",omitempty"`
}

// layerRow is what is needed to find, verify or fetch a layer again.
type layerRow struct {
	Digest    string // of the blob
	MediaType string
	Size      int64 // of the blob, in bytes
	DiffID    string
	ChainID   string
}

var (
	imageRows = store.NewTable[imageRow]("images", 1)
	// blobRows keeps configs and manifests byte for byte under their digests.
	blobRows = store.NewTable[[]byte]("image-blobs", 1)
)

func (r *imageRow) chainID() string {
	if len(r.Layers) == 0 {
		return ""
	}
	return r.Layers[len(r.Layers)-1].ChainID
}

func chainIDs(layers []layerRow) []string {
	ids := make([]string, len(layers))
	for i, l := range layers {
		ids[i] = l.ChainID
	}
	return ids
}

// view is the immutable state that reads use.
type view struct {
	rows   map[string]*imageRow // by ID, dropped ones included
	images map[string]Image     // by ID, visible ones
	list   []Image              // sorted by ID
	names  map[string]string    // full tag or repo digest -> ID
	chains map[string]bool      // layers that some row needs
}

// newView builds the view of rows, which must not change afterwards.
func newView(rows map[string]*imageRow, pinned []string) *view {
	v := &view{rows: rows, images: map[string]Image{}, names: map[string]string{}, chains: map[string]bool{}}
	for id, r := range rows {
		for _, l := range r.Layers {
			v.chains[l.ChainID] = true
		}
		if r.Dropped || r.Damaged {
			continue
		}
		img := Image{
			ID: id, RepoTags: r.Tags, RepoDigests: r.Digests, Size: r.Size, ChainID: r.chainID(), Config: r.Config,
			Pinned: r.Pinned || isPinned(r, pinned), Created: r.Created, Pulled: r.Pulled,
			OS: r.OS, Architecture: r.Architecture, Variant: r.Variant,
		}
		v.images[id] = img
		v.list = append(v.list, img)
		for _, n := range r.names() {
			v.names[n] = id
		}
	}
	sort.Slice(v.list, func(i, j int) bool { return v.list[i].ID < v.list[j].ID })
	return v
}

func (r *imageRow) names() []string { return slices.Concat(r.Tags, r.Digests) }

func isPinned(r *imageRow, patterns []string) bool {
	for _, p := range patterns {
		full := p
		if named, err := parseReference(p, ""); err == nil {
			full = named.String()
		}
		for _, n := range r.names() {
			if ok, _ := path.Match(p, n); ok || n == full {
				return true
			}
		}
	}
	return false
}

// find returns the ID that text means, or ErrNotFound.
func (v *view) find(text string, search shortNames) (string, error) {
	if id, ok := v.byID(text, 64); ok {
		return id, nil
	}
	names, err := candidates(text, search)
	if err == nil {
		for _, n := range names {
			if id, ok := v.names[n.String()]; ok {
				return id, nil
			}
		}
	}
	// Names first: a repository may be called like the beginning of an ID.
	if id, ok := v.byID(text, minIDPrefix); ok {
		return id, nil
	}
	if _, isID := idPrefix(text); err != nil && !isID {
		return "", err
	}
	return "", fmt.Errorf("%w: %q", ErrNotFound, text)
}

// byID finds the one image whose ID begins with text, of at least n digits.
func (v *view) byID(text string, n int) (string, bool) {
	prefix, ok := idPrefix(text)
	if !ok || len(prefix) < n {
		return "", false
	}
	prefix = "sha256:" + prefix
	i := sort.Search(len(v.list), func(i int) bool { return v.list[i].ID >= prefix })
	if i == len(v.list) || !strings.HasPrefix(v.list[i].ID, prefix) {
		return "", false
	}
	if i+1 < len(v.list) && strings.HasPrefix(v.list[i+1].ID, prefix) {
		return "", false // ambiguous
	}
	return v.list[i].ID, true
}

// commit changes rows, if there are any to change, in one transaction and then replaces
// the view. change gets the current row of an ID, nil for none, and the ID; nil as the
// result removes the row. It may be called more than once and must return a new row
// rather than change the old one.
func (s *Service) commit(ids []string, change func(id string, old *imageRow) *imageRow) error {
	if len(ids) == 0 {
		return nil
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	return s.commitLocked(ids, change, nil)
}

// commitLocked also writes blobs along.
func (s *Service) commitLocked(ids []string, change func(id string, old *imageRow) *imageRow, blobs map[string][]byte) error {
	rows := make(map[string]*imageRow, len(s.view.Load().rows)+1)
	for id, r := range s.view.Load().rows {
		rows[id] = r
	}
	err := s.book.Update(func(tx *store.Tx) error {
		for digest, b := range blobs {
			if err := blobRows.Put(tx, digest, b); err != nil {
				return err
			}
		}
		for _, id := range ids {
			old := s.view.Load().rows[id] // the book's, as only this function writes it
			r := change(id, old)
			if r == nil {
				delete(rows, id)
				if err := dropRow(tx, id, old); err != nil {
					return err
				}
				continue
			}
			rows[id] = r
			if err := imageRows.Put(tx, id, *r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	s.view.Store(newView(rows, *s.pinned.Load()))
	return nil
}

func dropRow(tx *store.Tx, id string, old *imageRow) error {
	errs := []error{imageRows.Delete(tx, id), blobRows.Delete(tx, id)}
	if old != nil && old.Manifest != "" {
		errs = append(errs, blobRows.Delete(tx, old.Manifest))
	}
	return errors.Join(errs...)
}

// load reads all rows. Those that cannot be read are in the quarantine afterwards.
func load(st *store.Store) (map[string]*imageRow, error) {
	rows := map[string]*imageRow{}
	err := st.View(func(tx *store.Tx) error {
		clear(rows)
		return imageRows.Each(tx, func(id string, r imageRow) error {
			rows[id] = &r
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	return rows, nil
}
