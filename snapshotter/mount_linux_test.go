package snapshotter

import (
	"os"
	"strings"
	"testing"
)

func TestCompact(t *testing.T) {
	short := []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a/l/1:/a/l/2", "upperdir=/a/s/3/upper", "workdir=/a/s/3/work"}}}
	if dir, got := Compact(short); dir != "" || &got[0] != &short[0] {
		t.Errorf("short options: got dir %q, %v; want them as they are", dir, got)
	}
	var lowers []string
	for range os.Getpagesize() / 8 {
		lowers = append(lowers, "/var/x/layers/7")
	}
	long := []Mount{{Type: "overlay", Options: []string{"lowerdir=" + strings.Join(lowers, ":"), "upperdir=/var/x/s/upper"}}}
	dir, got := Compact(long)
	if dir != "/var/x/layers" {
		t.Fatalf("dir %q, want /var/x/layers", dir)
	}
	if want := "lowerdir=7" + strings.Repeat(":7", len(lowers)-1); got[0].Options[0] != want {
		t.Errorf("options %.60q, want relative ones", got[0].Options[0])
	}
	if got[0].Options[1] != "upperdir=/var/x/s/upper" {
		t.Errorf("upperdir became %q", got[0].Options[1])
	}
	if !strings.HasPrefix(long[0].Options[0], "lowerdir=/var") {
		t.Error("the caller's own options were changed")
	}
}

func TestCommonDir(t *testing.T) {
	for _, tc := range []struct {
		want  string
		paths []string
	}{
		{"", nil}, {"/a", []string{"/a/b"}}, {"/a", []string{"/a/b/c", "/a/d"}}, {"", []string{"/a/b", "/c/d"}},
		{"/a", []string{"/a/bc/x", "/a/b/x"}},
	} {
		if got := commonDir(tc.paths); got != tc.want {
			t.Errorf("%v: got %q, want %q", tc.paths, got, tc.want)
		}
	}
}
