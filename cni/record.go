package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// recordVersion is the layout of a record file.
const recordVersion = 1

// maxRecordSize bounds what is read back: a configuration in base64 and the
// pod's own values.
const maxRecordSize = 4 << 20

// record is all that a DEL needs. It is written before ADD runs and removed
// after DEL succeeded, so whoever has no record has nothing to clean.
//
// It is not synced to the disk: a crash of the daemon loses nothing, and a power
// cut that loses a record also takes the interfaces and rules; addresses that a
// plugin keeps in files are released by Detach with the current configuration.
type record struct {
	Version   int            `json:"version"`
	ID        string         `json:"id"`
	Name      string         `json:"name,omitempty"`
	Namespace string         `json:"namespace,omitempty"`
	NetNS     string         `json:"netns"`
	IfName    string         `json:"ifName"`
	Args      [][2]string    `json:"args"`
	Caps      map[string]any `json:"capabilities,omitempty"`
	Config    []byte         `json:"config"`
}

func newRecord(p Pod, rt *libcni.RuntimeConf, n *network) record {
	return record{
		Version: recordVersion, ID: p.ID, Name: p.Name, Namespace: p.Namespace,
		NetNS: rt.NetNS, IfName: rt.IfName, Args: rt.Args, Caps: rt.CapabilityArgs,
		Config: n.list.Bytes,
	}
}

func (r record) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: r.ID, NetNS: r.NetNS, IfName: r.IfName, Args: r.Args, CapabilityArgs: r.Caps,
	}
}

// records is the directory of record files.
type records struct {
	dir string
}

const (
	recordSuffix = ".json"
	tmpSuffix    = ".tmp"
)

// openRecords makes the directory and, with tidy, removes files that a crash left
// unfinished.
func openRecords(dir string, tidy bool) (records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return records{}, fmt.Errorf("records: %w", err)
	}
	if !tidy {
		return records{dir: dir}, nil
	}
	tmp, err := filepath.Glob(filepath.Join(dir, "*"+tmpSuffix))
	if err != nil {
		return records{}, fmt.Errorf("records: %w", err)
	}
	for _, path := range tmp {
		if err := os.Remove(path); err != nil {
			return records{}, fmt.Errorf("records: %w", err)
		}
	}
	return records{dir: dir}, nil
}

func (s records) path(id string) string { return filepath.Join(s.dir, id+recordSuffix) }

func (s records) put(r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	tmp := s.path(r.ID) + tmpSuffix
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("record: %w", errors.Join(err, removeIfThere(tmp)))
	}
	if err := os.Rename(tmp, s.path(r.ID)); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// get returns fs.ErrNotExist for a pod without a record, and ErrInvalid for a
// record that cannot be used.
func (s records) get(id string) (record, *network, error) {
	b, err := readBounded(s.path(id), maxRecordSize)
	if err != nil {
		return record{}, nil, fmt.Errorf("record: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, nil, fmt.Errorf("record: %w: %w", ErrInvalid, err)
	}
	if r.Version != recordVersion || r.ID != id || r.IfName == "" {
		return record{}, nil, fmt.Errorf("record: %w: version %d of pod %q, want %d of %q", ErrInvalid, r.Version, clip(r.ID), recordVersion, id)
	}
	n, err := parseNetwork(r.Config)
	if err == nil {
		err = n.check()
	}
	if err != nil {
		return record{}, nil, fmt.Errorf("record: configuration: %w", err)
	}
	return r, n, nil
}

func (s records) remove(id string) error {
	if err := removeIfThere(s.path(id)); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// ids are the pods that have a record file, readable or not.
func (s records) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("records: %w", err)
	}
	var ids []string
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if ok && checkID(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
