package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
)

// An image volume is an image that a container has mounted, read-only, like a
// directory of the host. It has a view of the image's layers as a snapshot of
// its own, whose key is derived from the container's ID. The shim mounts the view
// below the bundle, in the namespace in which the OCI runtime creates the
// container and from where the runtime binds it; the host never sees it.

// volumeRow is an image volume in the record of its container.
type volumeRow struct {
	Mount   int    // index in the configuration's mounts
	ImageID string // "sha256:…"
}

const volumeMark = "-vol-"

func volumeKey(id string, mount int) string { return id + volumeMark + strconv.Itoa(mount) }

// snapshotOwner returns the ID of the container that a snapshot was made for.
func snapshotOwner(key string) string {
	id, _, _ := strings.Cut(key, volumeMark)
	return id
}

// volumeTarget is where the shim mounts a volume, below the bundle.
func volumeTarget(mount int) string { return "vol-" + strconv.Itoa(mount) }

// imageVolume is an image volume on the way to being made.
type imageVolume struct {
	mount  int
	image  imageservice.Image
	sub    string // as asked for
	mounts []snapshotter.Mount
}

// isVolume tells whether a mount is of an image and not of a host path.
func isVolume(m *runtime.Mount) bool { return m.GetImage().GetImage() != "" }

// planVolumes finds the images of a container's image volumes.
func (s *Service) planVolumes(plan *containerPlan) error {
	for i, m := range plan.config.GetMounts() {
		if !isVolume(m) {
			continue
		}
		image, err := s.deps.Images.Get(m.GetImage().GetImage())
		if err == nil {
			err = checkVolume(m)
		}
		if err != nil {
			return fmt.Errorf("mounts[%d] (container_path %.200q): image.image %.200q: %w", i, m.GetContainerPath(), m.GetImage().GetImage(), err)
		}
		plan.volumes = append(plan.volumes, imageVolume{mount: i, image: image, sub: m.GetImageSubPath()})
		plan.row.Volumes = append(plan.row.Volumes, volumeRow{Mount: i, ImageID: image.ID})
	}
	return nil
}

// checkVolume refuses what an image cannot be mounted with.
func checkVolume(m *runtime.Mount) error {
	switch {
	case m.GetHostPath() != "":
		return fmt.Errorf("%w: host_path %.200q: must be empty for an image", ErrInvalid, m.GetHostPath())
	case !m.GetReadonly():
		return fmt.Errorf("%w: readonly false: an image can only be mounted read-only", ErrInvalid)
	case m.GetPropagation() == runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return fmt.Errorf("%w: propagation: bidirectional is not possible for an image", ErrInvalid)
	case m.GetImageSubPath() != "" && !filepath.IsLocal(m.GetImageSubPath()):
		return fmt.Errorf("%w: image_sub_path %.200q: does not stay in the image", ErrInvalid, m.GetImageSubPath())
	}
	return nil
}

// makeVolumes makes the views and finds what the container gets of each.
func (s *Service) makeVolumes(ctx context.Context, plan *containerPlan) error {
	for i := range plan.volumes {
		v := &plan.volumes[i]
		m := &plan.in.Mounts[v.mount]
		var err error
		if v.mounts, err = s.deps.Snapshots.View(ctx, volumeKey(plan.row.ID, v.mount), v.image.ChainID); err == nil {
			m.Source, err = volumeSource(v, filepath.Join(s.bundleDir(plan.row.ID), volumeTarget(v.mount)))
		}
		if err != nil {
			return fmt.Errorf("mounts[%d] (container_path %.200q): %w", v.mount, m.Destination, err)
		}
	}
	return nil
}

// volumeSource is the path of a volume's sub-path when the volume is mounted at
// target. Symbolic links in the image are resolved here, with the image as their
// root, so that there are none left for anybody to follow out of it; that an
// image never changes makes the path good for later.
func volumeSource(v *imageVolume, target string) (string, error) {
	if v.sub == "" {
		return target, nil
	}
	root, err := snapshotter.OpenRoot(v.mounts)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sub, err := resolveIn(root, v.sub)
	if err != nil {
		return "", fmt.Errorf("%w: image_sub_path %.200q in image %s: %w", ErrInvalid, v.sub, v.image.ID, err)
	}
	return filepath.Join(target, sub), nil
}

// resolveIn resolves a path with root as its root directory, and returns it
// without symbolic links, relative to root. What is there has to be a
// directory or a regular file.
func resolveIn(root *os.File, name string) (string, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := openat2(int(root.Fd()), name, &how)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return "", errors.New("neither a directory nor a regular file")
	}
	// The kernel knows the way that it took. Of a file system that is
	// mounted nowhere it tells paths from that one's root.
	top, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(root.Fd())))
	if err != nil {
		return "", err
	}
	full, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(top, full)
	if err != nil || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("resolved to %.200q, which is not below %.200q", full, top)
	}
	// What has been resolved must be what is found without links.
	how.Resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS
	again, err := openat2(int(root.Fd()), rel, &how)
	if err != nil {
		return "", err
	}
	defer unix.Close(again)
	var st2 unix.Stat_t
	if err := unix.Fstat(again, &st2); err != nil {
		return "", err
	}
	if st2.Ino != st.Ino || st2.Dev != st.Dev {
		return "", fmt.Errorf("resolved to %.200q, which is another file", rel)
	}
	return rel, nil
}

// volumeMounts makes the mount points of a container's image volumes in its
// bundle and returns what the shim is to mount there.
func volumeMounts(bundle string, volumes []imageVolume, mountLabel string, u *userNS) ([]shim.Mount, error) {
	var out []shim.Mount
	for _, v := range volumes {
		target := volumeTarget(v.mount)
		if err := os.Mkdir(filepath.Join(bundle, target), 0o755); err != nil {
			return nil, err
		}
		mounts, err := shimMounts(labelled(v.mounts, mountLabel, bundle), target, u)
		if err != nil {
			return nil, err
		}
		out = append(out, mounts...)
	}
	return out, nil
}

// maxImageDirs bounds how many directories an image may have made, and
// maxImageDir the bytes of one's path.
const (
	maxImageDirs = 256
	maxImageDir  = 4095
)

// makeImageDirs makes the directories that the image declares with VOLUME and does
// not have. That is all that a declaration does: Kubernetes has volumes of its
// own, and a program only counts on the directory.
func makeImageDirs(plan *containerPlan, root *os.File) error {
	declared := plan.image.Config.Volumes
	if len(declared) > maxImageDirs {
		return fmt.Errorf("%w: image %s: %d volumes, limit %d", ErrInvalid, plan.image.ID, len(declared), maxImageDirs)
	}
	for _, dir := range slices.Sorted(maps.Keys(declared)) {
		if len(dir) > maxImageDir || strings.ContainsRune(dir, 0) {
			return fmt.Errorf("%w: image %s: volume %.200q: not a path below %d bytes", ErrInvalid, plan.image.ID, dir, maxImageDir+1)
		}
		if err := snapshotter.MakeDir(plan.mounts, root, dir); err != nil {
			return fmt.Errorf("image %s: volume: %w", plan.image.ID, err)
		}
	}
	return nil
}

// removeSnapshots removes the writable layer of a container and its views.
func (s *Service) removeSnapshots(ctx context.Context, c *container) error {
	var errs []error
	for _, k := range c.snapshots() {
		if err := s.deps.Snapshots.Remove(ctx, k); !errors.Is(err, snapshotter.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// snapshots are the keys of the container's writable layer and of its views.
func (c *container) snapshots() []string {
	keys := []string{c.ID}
	for _, v := range c.Volumes {
		keys = append(keys, volumeKey(c.ID, v.Mount))
	}
	return keys
}

// images are the IDs of the images that the container is made of.
func (c *container) images() []string {
	ids := []string{c.ImageID}
	for _, v := range c.Volumes {
		ids = append(ids, v.ImageID)
	}
	return ids
}

// freeImages frees the layers of images that were removed while the container
// used them.
func (s *Service) freeImages(ctx context.Context, c *container) {
	for _, id := range c.images() {
		if _, err := s.deps.Images.Get(id); err == nil {
			continue
		}
		if err := s.deps.Images.GC(ctx); err != nil {
			klog.FromContext(ctx).Error(err, "Layers of a removed image not freed", "image", id)
		}
		return // one collection is for all of them
	}
}

// mounts are the container's mounts as its status tells them: those of the
// configuration, and the digest of each volume's image.
func (c *container) mounts() []*runtime.Mount {
	list := c.config.GetMounts()
	if len(c.Volumes) == 0 {
		return list
	}
	out := append([]*runtime.Mount(nil), list...)
	for _, v := range c.Volumes {
		if v.Mount < len(out) {
			m := proto.Clone(out[v.Mount]).(*runtime.Mount)
			m.Image.ImageRef = v.ImageID
			out[v.Mount] = m
		}
	}
	return out
}
