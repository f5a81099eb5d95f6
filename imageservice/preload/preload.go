// Package preload imports the image archives that are put into a directory: at the start
// and whenever something changes there. It is how a node without a registry gets its images.
//
// # Nouns
//
//   - archive: a file called *.tar, *.tar.gz, *.tgz, *.tar.zst or *.tzst, or a directory
//     with an index.json or a manifest.json in it. Other names, and those that begin with a
//     dot, are passed over.
//   - stamp: what tells that an archive is still the same one: inode, size and time of
//     change.
//   - row: in the book, which images an archive with a stamp has brought. One whose
//     images are all there is not opened again, whatever its size.
//
// # Caveats
//
//   - The directory says what is to be on the node: an image that was removed comes back at
//     the next start or change. An archive that is taken away takes no image with it.
//   - An archive is read when its stamp has not changed for a second, so that copying one
//     into the directory is no race; moving it there is better all the same.
//   - A broken archive is reported once, and again when it has changed or at the next start.
package preload

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/store"
)

// Images are the images of the node.
type Images interface {
	Import(ctx context.Context, f *os.File, o imageservice.ImportOptions) ([]imageservice.Image, error)
	Get(ref string) (imageservice.Image, error)
}

const (
	// quiet is for how long an archive must not have changed.
	quiet = time.Second
	// interval is how often the directory is looked at without cause: it finds what
	// file events do not tell, and tries again what may have been bad luck.
	interval = time.Minute
	// maxEntries bounds what is looked at in the directory.
	maxEntries = 4096
)

// Dir is a directory of archives. Make it with New.
type Dir struct {
	path   string
	pin    bool
	book   *store.Store
	images Images

	seen   map[string]look // by name, as of the last scan
	failed map[string]failure
}

// look is what a scan saw of an archive.
type look struct {
	stamp stamp
	since time.Time // since when it is so
}

type failure struct {
	stamp stamp
	text  string
	final bool // the archive is at fault, so that trying again is of no use
}

// stamp tells contents apart without reading them.
type stamp struct {
	Inode uint64
	Size  int64
	Mtime int64 // nanoseconds
	Ctime int64
}

// row is an archive that was imported.
type row struct {
	Stamp  stamp
	Pinned bool
	Images []string // IDs
}

var rows = store.NewTable[row]("preload", 1)

// New returns the directory at path, which need not exist. Images are pinned if pin
// is set. The book and the images stay the caller's.
func New(path string, pin bool, book *store.Store, images Images) *Dir {
	return &Dir{path: path, pin: pin, book: book, images: images, seen: map[string]look{}, failed: map[string]failure{}}
}

// Run imports what is there and what comes, until ctx ends; then it returns nil.
func (d *Dir) Run(ctx context.Context) error {
	log := klog.FromContext(ctx).WithValues("dir", d.path)
	ctx = klog.NewContext(ctx, log)
	watcher, err := fsnotify.NewWatcher()
	var events <-chan fsnotify.Event
	if err != nil {
		log.Info("No file events; looking at preloaded images from time to time", "interval", interval, "reason", err.Error())
	} else {
		defer watcher.Close()
		events = watcher.Events
	}
	// Below a directory that is there, so that it can be watched from the start.
	if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		log.V(2).Info("No directory for preloaded images", "reason", err.Error())
	}
	for {
		if watcher != nil {
			_ = watcher.Add(d.path) // again each time: it may have been made since
		}
		wait := interval
		if unsettled := d.scan(ctx); unsettled {
			wait = quiet
		}
		timer := time.NewTimer(wait)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
				waiting = false
			case _, ok := <-events:
				if !ok {
					events = nil
				} else if wait == interval {
					waiting = false
				}
			case <-errorsOf(watcher):
				// Events were lost: the next look finds what they were about.
			}
		}
		timer.Stop()
	}
}

func errorsOf(w *fsnotify.Watcher) <-chan error {
	if w == nil {
		return nil
	}
	return w.Errors
}

// scan looks at every archive once and imports those that are new and settled. It tells
// whether there are some that are not settled.
func (d *Dir) scan(ctx context.Context) (unsettled bool) {
	log := klog.FromContext(ctx)
	names, err := d.archives()
	if err != nil {
		d.report(ctx, ".", failure{text: err.Error()})
		return false
	}
	if len(d.seen) == 0 {
		d.forget(ctx, names)
	}
	now := map[string]look{}
	for _, name := range names {
		st, err := stampOf(filepath.Join(d.path, name))
		if err != nil {
			continue // gone again
		}
		l, ok := d.seen[name]
		if !ok || l.stamp != st {
			l = look{st, time.Now()}
		}
		now[name] = l
		switch done, err := d.done(name, st); {
		case err != nil:
			log.Error(err, "Record of preloaded images not read", "archive", name)
		case done, d.failed[name].final && d.failed[name].stamp == st:
		case time.Since(l.since) < quiet:
			unsettled = true
		default:
			d.take(ctx, name, st)
		}
	}
	d.seen = now
	return unsettled
}

// forget drops the rows of archives that were taken away.
func (d *Dir) forget(ctx context.Context, names []string) {
	var gone []string
	err := d.book.View(func(tx *store.Tx) error {
		return rows.Each(tx, func(name string, _ row) error {
			if !slices.Contains(names, name) {
				gone = append(gone, name)
			}
			return nil
		})
	})
	if err == nil && len(gone) > 0 {
		err = d.book.Update(func(tx *store.Tx) error {
			for _, name := range gone {
				if err := rows.Delete(tx, name); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "Records of archives that are gone not removed")
	}
}

// archives lists the names in the directory that are archives.
func (d *Dir) archives() ([]string, error) {
	f, err := os.Open(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.Readdirnames(maxEntries)
	if err != nil && len(entries) == 0 {
		return nil, nil // empty: io.EOF
	}
	slices.Sort(entries)
	return slices.DeleteFunc(entries, func(n string) bool { return !d.isArchive(n) }), nil
}

func (d *Dir) isArchive(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	st, err := os.Stat(filepath.Join(d.path, name))
	if err != nil {
		return false
	}
	if st.IsDir() {
		return list(filepath.Join(d.path, name)) != ""
	}
	ends := func(s string) bool { return strings.HasSuffix(name, s) }
	return st.Mode().IsRegular() && slices.ContainsFunc([]string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst"}, ends)
}

// list is the file that lists the images of a directory, "" if there is none.
func list(dir string) string {
	for _, n := range []string{"index.json", "manifest.json"} {
		if st, err := os.Stat(filepath.Join(dir, n)); err == nil && st.Mode().IsRegular() {
			return filepath.Join(dir, n)
		}
	}
	return ""
}

func stampOf(path string) (stamp, error) {
	if l := list(path); l != "" {
		path = l
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return stamp{}, err
	}
	return stamp{st.Ino, st.Size, unix.TimespecToNsec(st.Mtim), unix.TimespecToNsec(st.Ctim)}, nil
}

// done tells whether all that an archive has is on the node.
func (d *Dir) done(name string, st stamp) (bool, error) {
	var r row
	err := d.book.View(func(tx *store.Tx) (err error) {
		r, err = rows.Get(tx, name)
		return err
	})
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrCorrupt) {
		return false, nil
	}
	if err != nil || r.Stamp != st || d.pin && !r.Pinned {
		return false, err
	}
	for _, id := range r.Images {
		if _, err := d.images.Get(id); err != nil {
			return false, nil
		}
	}
	return true, nil
}

// take imports an archive and notes what it brought.
func (d *Dir) take(ctx context.Context, name string, st stamp) {
	log := klog.FromContext(ctx)
	f, err := os.OpenFile(filepath.Join(d.path, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		d.report(ctx, name, failure{stamp: st, text: err.Error()})
		return
	}
	defer f.Close()
	began := time.Now()
	images, err := d.images.Import(ctx, f, imageservice.ImportOptions{Pin: d.pin})
	if ctx.Err() != nil {
		return
	}
	for _, img := range images {
		log.Info("Image preloaded", "archive", name, "image", img.ID, "tags", img.RepoTags, "took", time.Since(began))
	}
	if err != nil {
		d.report(ctx, name, failure{stamp: st, text: err.Error(), final: isFinal(err)})
		return
	}
	delete(d.failed, name)
	r := row{Stamp: st, Pinned: d.pin}
	for _, img := range images {
		r.Images = append(r.Images, img.ID)
	}
	if err := d.book.Update(func(tx *store.Tx) error { return rows.Put(tx, name, r) }); err != nil {
		log.Error(err, "Preloaded images not recorded, the archive will be read again", "archive", name)
	}
}

// isFinal: the archive itself is at fault.
func isFinal(err error) bool {
	for _, e := range []error{imageservice.ErrInvalidImage, imageservice.ErrInvalidReference, imageservice.ErrUnsupported,
		imageservice.ErrTooLarge, imageservice.ErrDigestMismatch} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// report logs a failure unless it was the last one that this archive had.
func (d *Dir) report(ctx context.Context, name string, f failure) {
	if d.failed[name] == f {
		return
	}
	d.failed[name] = f
	klog.FromContext(ctx).Error(errors.New(f.text), "Archive of images not imported", "archive", name, "triedAgain", !f.final)
}
