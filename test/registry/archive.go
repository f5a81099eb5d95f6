package registry

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Named is an image and the names that an archive gives it.
type Named struct {
	Image *Image
	Names []string // in full; one without a slash is written as a mere tag
}

// Layout returns the files of an OCI image layout of the images, by name.
func Layout(images ...Named) (map[string][]byte, error) {
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	type entry struct {
		Descriptor
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	entries := []entry{}
	for _, n := range images {
		d := Descriptor{MediaType: n.Image.MediaType, Digest: n.Image.Digest, Size: int64(len(n.Image.Manifest))}
		if n.Image.platform.OS != "" {
			d.Platform = &n.Image.platform
		}
		n.Image.blobFiles(files)
		names := n.Names
		if len(names) == 0 {
			names = []string{""}
		}
		for _, name := range names {
			e := entry{Descriptor: d}
			switch {
			case strings.Contains(name, "/"):
				e.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:]}
			case name != "":
				e.Annotations = map[string]string{"org.opencontainers.image.ref.name": name}
			}
			entries = append(entries, e)
		}
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": entries})
	if err != nil {
		return nil, fmt.Errorf("layout: %w", err)
	}
	files["index.json"] = index
	return files, nil
}

func (img *Image) blobFiles(files map[string][]byte) {
	name := func(d string) string { return "blobs/" + strings.Replace(d, ":", "/", 1) }
	files[name(img.Digest)] = img.Manifest
	for d, b := range img.blobs {
		files[name(d)] = b
	}
	for _, c := range img.children {
		c.blobFiles(files)
	}
}

// DockerSave returns the files of an archive as "docker save" wrote it before it knew of
// OCI layouts. Layers are stored as the images have them.
func DockerSave(images ...Named) (map[string][]byte, error) {
	files := map[string][]byte{}
	type entry struct {
		Config           string
		RepoTags, Layers []string
	}
	var list []entry
	for _, n := range images {
		e := entry{Config: strings.TrimPrefix(n.Image.ConfigID, "sha256:") + ".json", RepoTags: n.Names}
		files[e.Config] = n.Image.blobs[n.Image.ConfigID]
		for i, l := range n.Image.Layers {
			name := fmt.Sprintf("%s-%d/layer.tar", n.Image.ConfigID[7:19], i)
			files[name] = n.Image.blobs[l.Digest]
			e.Layers = append(e.Layers, name)
		}
		list = append(list, e)
	}
	b, err := json.Marshal(list)
	if err != nil {
		return nil, fmt.Errorf("docker archive: %w", err)
	}
	files["manifest.json"] = b
	return files, nil
}

// Tar writes files as a tar archive, in the order of their names.
func Tar(w io.Writer, files map[string][]byte) error {
	tw := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[name])), ModTime: epoch}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("member %q: %w", name, err)
		}
		if _, err := tw.Write(files[name]); err != nil {
			return fmt.Errorf("member %q: %w", name, err)
		}
	}
	return tw.Close()
}
