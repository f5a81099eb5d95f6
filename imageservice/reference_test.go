package imageservice

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestReferenceGolden: testdata/references has one reference a line, then what it means.
func TestReferenceGolden(t *testing.T) {
	const golden = "testdata/references"
	sum := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	var out strings.Builder
	for _, in := range []string{
		"busybox", "busybox:1.36", "busybox@" + sum, "busybox:1.36@" + sum, "library/busybox", "me/app", "docker.io/busybox", "index.docker.io/me/app",
		"localhost/app", "localhost:5000/app", "127.0.0.1:5000/a/b:c", "[::1]:5000/app:v1", "registry.example/app", "registry.example:443/a/b/c:v1.2-x_y",
		"cafe", "deadbeefcafe", strings.Repeat("a", 64), sum, sum[7:20],
		"", " ", "UPPER", "host.example/Upper", "a:b:c", "a//b", "/a", "a/", "-a", "a@sha256:12", "a@md5:d41d8cd98f00b204e9800998ecf8427e", "a:", "a:" + strings.Repeat("t", 129),
		"http://host.example/app", "a b", "a\x00b", "../a", "host.example/../a", strings.Repeat("n", 300),
	} {
		named, err := candidates(in, shortNames{search: []string{"docker.io", "search.example"}})
		fmt.Fprintf(&out, "%q\n", in)
		if err != nil {
			if !errors.Is(err, ErrInvalidReference) {
				t.Errorf("%q: %v is not ErrInvalidReference", in, err)
			}
			fmt.Fprintf(&out, "\t%v\n", err)
		}
		for _, n := range named {
			fmt.Fprintf(&out, "\t%s\n", n)
		}
	}
	if *update {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("differs from %s, see with -update:\n%s", golden, out.String())
	}
}

// FuzzReference: what is accepted has a host and a tag or digest, and means itself.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "h.example:1/a@sha256:" + strings.Repeat("a", 64), "localhost/x", "[::1]:5/x", ":", "@", "a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		named, err := parseReference(s, "search.example")
		if err != nil {
			if !errors.Is(err, ErrInvalidReference) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		again, err := parseReference(named.String(), "other.example")
		if err != nil || again.String() != named.String() {
			t.Fatalf("%q became %q, and that %v, %v", s, named, again, err)
		}
		if _, id := idPrefix(named.String()); id {
			t.Fatalf("%q became %q, which looks like an ID", s, named)
		}
	})
}
