package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/manifest"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice/archive"
)

// ImportOptions say what to do with the images of an archive.
type ImportOptions struct {
	// Name is given to the image instead of the names in the archive: a reference. When
	// the archive has several images, or when the one in it has no more than a tag for
	// a name, it must be a repository without a tag, to which the tags of the archive are added.
	Name string
	// Pin pins the images.
	Pin bool
	// Report is told, from one goroutine at a time, what is being done; may be nil.
	Report func(ImportReport)
}

// ImportReport is a step of an import.
type ImportReport struct {
	Name  string // of the image, or its ID
	Stage string
	// Bytes of Total are read of what has to be; Total may be 0 for not known.
	Bytes, Total int64
	// Image is set when one is complete; Present if all of it was there before.
	Image   *Image
	Present bool
	// Err is set when one failed, while the rest goes on.
	Err error
}

const stageSpool = "reading the archive"

// Import makes the images of an archive visible: a tar file of an OCI image layout or of
// "docker save", plain or in gzip or zstd, or such a directory (package archive). f stays
// the caller's. Layers that are there are not read. Like a pull, an import of an image is
// whole or has not happened. The signature policy is not asked: it is about registries.
//
// It returns the images that are there now, and all errors joined. Errors of the archive
// itself are ErrInvalidImage, ErrTooLarge, ErrDigestMismatch or ErrUnsupported.
func (s *Service) Import(ctx context.Context, f *os.File, o ImportOptions) ([]Image, error) {
	return s.importFrom(ctx, f.Name(), o, func(ctx context.Context, opt archive.Options, progress func(int64)) (*archive.Archive, error) {
		return archive.Open(ctx, f, opt, progress)
	})
}

// ImportStream is Import for an archive that comes as a stream.
func (s *Service) ImportStream(ctx context.Context, r io.Reader, o ImportOptions) ([]Image, error) {
	return s.importFrom(ctx, "stream", o, func(ctx context.Context, opt archive.Options, progress func(int64)) (*archive.Archive, error) {
		return archive.OpenStream(ctx, r, opt, progress)
	})
}

type openArchive func(ctx context.Context, opt archive.Options, progress func(int64)) (*archive.Archive, error)

// importFrom is one import from begin to end.
func (s *Service) importFrom(ctx context.Context, what string, o ImportOptions, open openArchive) (images []Image, err error) {
	defer func() {
		if v := recover(); v != nil {
			klog.FromContext(ctx).Error(nil, "Panic in an import", "panic", v, "stack", string(debug.Stack()))
			err = fmt.Errorf("import: panic: %v: %w", v, ErrInvalidImage)
		}
	}()
	if o.Report == nil {
		o.Report = func(ImportReport) {}
	}
	ctx, p, done, err := s.beginImport(ctx, what)
	if err != nil {
		return nil, err
	}
	defer done()
	r := &reporter{to: o.Report}
	a, err := open(ctx, s.archiveOptions(), func(n int64) { r.bytes(ImportReport{Name: what, Stage: stageSpool, Bytes: n}) })
	if err != nil {
		return nil, classifyArchive(because(ctx, err))
	}
	defer a.Close()
	found, err := a.Images()
	if err != nil {
		return nil, classifyArchive(err)
	}
	if err := checkImportName(o.Name, found); err != nil {
		return nil, err
	}
	var errs []error
	for i := range found {
		img, present, err := s.importOne(ctx, p, a, &found[i], o, r)
		if err != nil {
			err = fmt.Errorf("import: %w", classifyArchive(because(ctx, err)))
			errs = append(errs, err)
			r.say(ImportReport{Name: label(&found[i]), Err: err})
			continue
		}
		images = append(images, img)
		r.say(ImportReport{Name: label(&found[i]), Image: &img, Present: present})
	}
	return images, errors.Join(errs...)
}

func (s *Service) archiveOptions() archive.Options {
	return archive.Options{
		SpoolDir: filepath.Dir(s.cfg.LayersDir), MaxBytes: s.cfg.MaxArchiveBytes,
		Choose:  s.choose,
		Matches: func(os, arch string) bool { return os == s.cfg.OS && arch == s.cfg.Architecture },
	}
}

// beginImport registers an import among the pulls, so that it is shown there and Close
// ends it.
func (s *Service) beginImport(ctx context.Context, what string) (context.Context, *pull, func(), error) {
	own, cancel := context.WithCancelCause(ctx)
	p := &pull{ref: "import of " + what, done: make(chan struct{}), began: time.Now(), cancel: cancel, waiters: 1}
	p.enter(stageSpool)
	key := pullKey{ref: fmt.Sprintf("%s %d", p.ref, s.sequence.Add(1))} // no reference: there is a space in it
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		cancel(nil)
		return nil, nil, nil, ErrClosed
	}
	s.pulls[key] = p
	s.wg.Add(1)
	return own, p, func() {
		cancel(nil)
		s.mu.Lock()
		s.forgetPullLocked(key)
		s.mu.Unlock()
		close(p.done)
		s.wg.Done()
	}, nil
}

// importOne makes one image of an archive visible. present tells that nothing was to be
// done for it.
func (s *Service) importOne(ctx context.Context, p *pull, a *archive.Archive, from *archive.Image, o ImportOptions, r *reporter) (img Image, present bool, err error) {
	if from.Err != nil {
		return Image{}, false, from.Err
	}
	pl, err := s.importPlan(from, o.Name)
	if err != nil {
		return Image{}, false, err
	}
	pl.pin = o.Pin
	if img, ok := s.alreadyThere(pl, o.Pin); ok {
		return img, true, nil
	}
	var total int64
	for _, l := range pl.layers {
		if !s.view.Load().chains[l.ChainID] || s.isDamaged(l.ChainID) {
			total += l.Size
		}
	}
	at := &counter{r: r, report: ImportReport{Name: label(from), Stage: stageLayers, Total: total}}
	pl.local = func(d digest.Digest) (io.ReadCloser, error) {
		b, _, err := a.Blob(d)
		if err != nil {
			return nil, err
		}
		return &countedReader{b, at}, nil
	}
	began := time.Now()
	img, err = s.complete(ctx, p, pl)
	if err == nil {
		klog.FromContext(ctx).V(2).Info("Image imported", "image", img.ID, "tags", img.RepoTags, "took", time.Since(began))
	}
	return img, false, err
}

// importPlan is what an archive's image comes to.
func (s *Service) importPlan(from *archive.Image, name string) (*plan, error) {
	m, err := manifest.FromBlob(from.Manifest, from.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest of type %.100q: %w: %w", from.MediaType, ErrInvalidImage, err)
	}
	pl := &plan{manifest: from.Manifest, top: from.Top}
	if pl.manifestSum, err = manifest.Digest(from.Manifest); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", ErrInvalidImage, err)
	}
	if err := pl.setLayers(m); err != nil {
		return nil, err
	}
	id := digest.FromBytes(from.Config)
	if d := m.ConfigInfo().Digest; d != id {
		return nil, fmt.Errorf("config %.100q: content has digest %s: %w", d, id, ErrDigestMismatch)
	}
	if err := s.setConfig(pl, id, from.Config); err != nil {
		return nil, err
	}
	return pl, pl.setImportNames(from, name)
}

// setImportNames finds the names that an image is to have. The digest of what the
// archive's list points to is the repo digest of each repository that it is named after:
// whoever has that name and digest from a registry has the same bytes.
func (pl *plan) setImportNames(from *archive.Image, name string) error {
	names := from.Names
	switch {
	case name != "" && from.Tag != "" && isRepository(name):
		names = []string{name + ":" + from.Tag}
	case name != "":
		names = []string{name}
	}
	for _, n := range names {
		named, err := parseReference(n, "")
		if err != nil {
			return err
		}
		if t, ok := named.(reference.Tagged); ok {
			pl.tags = union(pl.tags, []string{named.Name() + ":" + t.Tag()})
		}
		d, ok := named.(reference.Digested)
		switch {
		case ok && d.Digest() != from.Top && d.Digest() != pl.manifestSum:
			return fmt.Errorf("name %q is for another digest than the image's, %s: %w", n, from.Top, ErrDigestMismatch)
		case ok:
			pl.digests = union(pl.digests, []string{named.String()})
		case from.Top != "":
			pl.digests = union(pl.digests, []string{named.Name() + "@" + from.Top.String()})
		}
	}
	return nil
}

// isRepository: the name has neither tag nor digest.
func isRepository(name string) bool {
	named, err := reference.ParseNormalizedNamed(name)
	return err == nil && reference.IsNameOnly(named)
}

func checkImportName(name string, images []archive.Image) error {
	if name == "" {
		return nil
	}
	if _, err := parseReference(name, ""); err != nil {
		return err
	}
	for _, img := range images {
		if len(images) > 1 && (img.Tag == "" || !isRepository(name)) && img.Err == nil {
			return fmt.Errorf("the archive has %d images with names of their own, so name %q cannot be given: %w", len(images), name, ErrInvalidReference)
		}
	}
	return nil
}

// alreadyThere returns the image if it is visible with all the names already.
func (s *Service) alreadyThere(pl *plan, pin bool) (Image, bool) {
	v := s.view.Load()
	img, ok := v.images[pl.id]
	if !ok || pin && !img.Pinned || len(s.damagedOf(pl.chainIDs())) > 0 {
		return img, false
	}
	for _, n := range slices.Concat(pl.tags, pl.digests) {
		if v.names[n] != pl.id {
			return img, false
		}
	}
	return img, true
}

func label(img *archive.Image) string {
	switch {
	case len(img.Names) > 0:
		return img.Names[0]
	case img.Tag != "":
		return img.Tag
	case img.Top != "":
		return img.Top.String()
	}
	return "image without a name"
}

// classifyArchive adds the sentinel that an error of package archive belongs to.
func classifyArchive(err error) error {
	if err == nil || isClassified(err) {
		return err
	}
	for _, m := range []struct{ from, to error }{
		{archive.ErrDigest, ErrDigestMismatch}, {archive.ErrTooLarge, ErrTooLarge}, {archive.ErrPlatform, ErrUnsupported},
		{archive.ErrFormat, ErrInvalidImage}, {archive.ErrMissing, ErrInvalidImage},
	} {
		if errors.Is(err, m.from) {
			return mark(m.to, err)
		}
	}
	return classify(err)
}

// reporter passes reports on, bytes only now and then.
type reporter struct {
	mu   sync.Mutex
	to   func(ImportReport)
	last time.Time
}

const reportEvery = 200 * time.Millisecond

func (r *reporter) say(rep ImportReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to(rep)
}

func (r *reporter) bytes(rep ImportReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.last) >= reportEvery {
		r.last = time.Now()
		r.to(rep)
	}
}

// counter adds up what is read of the layers of one image.
type counter struct {
	r      *reporter
	mu     sync.Mutex
	report ImportReport
}

type countedReader struct {
	io.ReadCloser
	c *counter
}

// Read implements io.Reader.
func (c *countedReader) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.c.mu.Lock()
	c.c.report.Bytes += int64(n)
	rep := c.c.report
	c.c.mu.Unlock()
	c.c.r.bytes(rep)
	return n, err
}

// localBytes are those of an archive: there are no others.
type localBytes struct {
	io.ReadCloser
	record *layerRecord
}

func (l *localBytes) distrust() bool { return false }

// Read implements io.Reader.
func (l *localBytes) Read(p []byte) (int, error) {
	began := time.Now()
	n, err := l.ReadCloser.Read(p)
	l.record.received(n, time.Since(began))
	return n, err
}
