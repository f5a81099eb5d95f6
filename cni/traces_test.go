package cni

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAddressesIn: whose the addresses are, of a directory that is shared with others
// and of one that is not.
func TestAddressesIn(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"10.0.0.2": idA + "\r\neth0", "10.0.0.3": "", "10.0.0.4": "no ID/\neth0", "last_reserved_ip.0": "10.0.0.4", "lock": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n := newNode(t).start()
	for _, tt := range []struct {
		own  bool
		want []string
	}{
		{false, []string{"10.0.0.2 " + idA}},
		{true, []string{"10.0.0.2 " + idA, "10.0.0.3 ", "10.0.0.4 "}},
	} {
		traces, err := n.addressesIn(t.Context(), dir, tt.own)
		var got []string
		for _, tr := range traces {
			got = append(got, filepath.Base(tr.What)+" "+tr.PodID)
		}
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("own %v: %q, %v; want %q", tt.own, got, err, tt.want)
		}
	}
	if got, err := n.addressesIn(t.Context(), filepath.Join(dir, "none"), true); got != nil || err != nil {
		t.Errorf("without a directory: %v, %v", got, err)
	}
}

// TestAddressesLocked: a plugin that hangs with the lock does not hang the search.
func TestAddressesLocked(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	n := newNode(t).start()
	if _, err := n.addressesIn(t.Context(), dir, true); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.addressesIn(over, dir, true); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the caller's end", err)
	}
	f.Close()
	if _, err := n.addressesIn(t.Context(), dir, true); err != nil {
		t.Errorf("unlocked: %v", err)
	}
}

// TestSavedRulesInTime: what iptables-save leaves behind with its output open is not
// waited for.
func TestSavedRulesInTime(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	pid := filepath.Join(bin, "pid")
	text := "#!/bin/sh\nsleep 300 &\necho $! >" + pid + "\n"
	if err := os.WriteFile(filepath.Join(bin, "iptables-save"), []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := savedRules(t.Context(), "iptables-save")
	if !errors.Is(err, exec.ErrWaitDelay) {
		t.Errorf("got %v, want no wait for the end of its child", err)
	}
	number, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(number)))
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(child, unix.SIGKILL)
}
