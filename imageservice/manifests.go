package imageservice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice/layer"
	"github.com/berthd/berth/snapshotter"
)

// ErrNoManifest: there is no list of what the layer holds, because it was unpacked by an
// earlier release, or that the list is damaged: whether the layer is whole cannot be known.
var ErrNoManifest = errors.New("layer manifest not usable")

// manifests keeps what layers hold, one file for each chain ID, beside the layers and not in
// the book. A file is written before its layer is committed and removed after it, so
// that what a crash leaves is a manifest without a layer, which sweep removes. The zero
// value keeps nothing.
type manifests struct {
	dir string
}

func newManifests(dir string) (manifests, error) {
	if dir == "" {
		return manifests{}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return manifests{}, fmt.Errorf("layer manifests: %w", err)
	}
	return manifests{dir: dir}, nil
}

// path is that of a chain ID, which has been validated and is hexadecimal after its colon.
func (m manifests) path(chain string) string {
	return filepath.Join(m.dir, strings.ReplaceAll(chain, ":", "-"))
}

// create opens a file that nobody reads yet; nil when nothing is kept.
func (m manifests) create(key string) (*os.File, error) {
	if m.dir == "" {
		return nil, nil
	}
	f, err := os.OpenFile(filepath.Join(m.dir, key+".tmp"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("layer manifest: %w", err)
	}
	return f, nil
}

// keep makes the file that create made that of the layer. It is made durable together with
// the layer.
func (m manifests) keep(key, chain string) error {
	if m.dir == "" {
		return nil
	}
	if err := os.Rename(filepath.Join(m.dir, key+".tmp"), m.path(chain)); err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	return nil
}

// drop removes what create made, unless keep was called.
func (m manifests) drop(key string) {
	if m.dir != "" {
		os.Remove(filepath.Join(m.dir, key+".tmp"))
	}
}

func (m manifests) remove(chains ...string) error {
	if m.dir == "" {
		return nil
	}
	var errs []error
	for _, chain := range chains {
		if err := os.Remove(m.path(chain)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("layer manifest: %w", err))
		}
	}
	return errors.Join(errs...)
}

// minRecord is less than any record of a manifest takes.
const minRecord = 2

// plausible looks at the beginning and the size of a layer's manifest.
func (m manifests) plausible(chain string, inodes int64) error {
	if m.dir == "" {
		return nil
	}
	f, err := os.Open(m.path(chain))
	if err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	if st.Size() < inodes*minRecord {
		return fmt.Errorf("layer manifest of %d bytes for %d files: %w", st.Size(), inodes, ErrNoManifest)
	}
	if err := layer.CheckManifestHeader(f); err != nil {
		return mark(ErrNoManifest, err)
	}
	return nil
}

// sweep removes the files of layers that are not there, and what was never finished. It
// may be called only while nothing is pulled.
func (m manifests) sweep(exists func(chain string) bool) error {
	files, err := m.all()
	errs := []error{err}
	for _, f := range files {
		if !exists(chainOf(f)) {
			errs = append(errs, os.RemoveAll(filepath.Join(m.dir, f)))
		}
	}
	return errors.Join(errs...)
}

// VerifyLayer compares a layer, by its chain ID, with the list of what it holds that was
// written when it was unpacked, and calls report for each deviation. The layer is kept
// meanwhile. Errors: ErrNotFound when there is no such layer, ErrNoManifest, ErrUnsupported
// when the snapshotter does not tell where its layers are. See layer.Verify.
func (s *Service) VerifyLayer(ctx context.Context, chainID string, opts layer.VerifyOptions, report func(layer.Deviation)) (layer.Checked, error) {
	locator, ok := s.sn.(snapshotter.Locator)
	if !ok || s.manifests.dir == "" {
		return layer.Checked{}, fmt.Errorf("layer %s: verification: %w", chainID, ErrUnsupported)
	}
	release, err := s.chains.hold(ctx, []string{chainID})
	if err != nil {
		return layer.Checked{}, err
	}
	defer release()
	dir, err := locator.Locate(ctx, chainID)
	if errors.Is(err, snapshotter.ErrNotFound) {
		return layer.Checked{}, mark(ErrNotFound, err)
	}
	if err != nil {
		return layer.Checked{}, err
	}
	root, err := os.Open(dir)
	if err != nil {
		return layer.Checked{}, fmt.Errorf("layer %s: %w", chainID, err)
	}
	defer root.Close()
	list, err := os.Open(s.manifests.path(chainID))
	if errors.Is(err, os.ErrNotExist) {
		return layer.Checked{}, fmt.Errorf("layer %s: %w", chainID, ErrNoManifest)
	}
	if err != nil {
		return layer.Checked{}, fmt.Errorf("layer %s: %w", chainID, err)
	}
	defer list.Close()
	checked, err := layer.Verify(ctx, root, list, opts, report)
	if errors.Is(err, layer.ErrManifest) {
		err = mark(ErrNoManifest, err)
	}
	if err != nil {
		return checked, fmt.Errorf("layer %s: %w", chainID, err)
	}
	klog.FromContext(ctx).V(2).Info("Layer verified", "layer", chainID, "entries", checked.Entries, "bytes", checked.Bytes, "deviations", checked.Deviations)
	return checked, nil
}
