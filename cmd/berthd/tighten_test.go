package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTighten(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: files belong to root")
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	l, err := net.Listen("unix", at("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = errors.Join(os.Mkdir(at("open"), 0o700), os.Mkdir(at("private"), 0o700), os.WriteFile(at("file"), nil, 0o600),
		os.Mkdir(at("open/below"), 0o700), os.Symlink("/usr", at("link")))
	for name, mode := range map[string]os.FileMode{"open": 0o777, "open/below": 0o755, "private": 0o700, "file": 0o644, "socket": 0o666} {
		err = errors.Join(err, os.Chmod(at(name), mode))
	}
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat("/usr")
	if err != nil {
		t.Fatal(err)
	}
	if err := tighten(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"open": 0o700, "open/below": 0o755, "private": 0o700, "file": 0o600, "socket": 0o600} {
		if fi, err := os.Lstat(at(name)); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", name, fi.Mode(), err, want)
		}
	}
	if after, err := os.Stat("/usr"); err != nil || after.Mode() != before.Mode() {
		t.Errorf("what a link names: %v, %v; was %v", after.Mode(), err, before.Mode())
	}
	if err := os.Chown(at("private"), 4242, 0); err != nil {
		t.Fatal(err)
	}
	if err := tighten(dir); err == nil || !strings.Contains(err.Error(), "4242") || !strings.Contains(err.Error(), at("private")) {
		t.Errorf("a directory of somebody else: %v, want an error that names both", err)
	}
	if err := tighten(at("none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}
