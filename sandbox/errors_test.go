package sandbox

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
)

func TestInvalidSaysItOnce(t *testing.T) {
	_, parent := cgroup.OCIPath(cgroup.Systemd, "/plain", "x")
	_, profile := spec.ParseSeccomp([]byte("{"))
	for _, tc := range []struct {
		field string
		err   error
		want  string
	}{
		{"", parent, `linux.cgroup_parent "/plain"`},
		{"localhost_ref", profile, "localhost_ref: "},
		{"host_path", fs.ErrNotExist, "host_path: file does not exist"},
	} {
		err := invalid(tc.field, tc.err)
		if !errors.Is(err, ErrInvalid) || !errors.Is(err, tc.err) {
			t.Errorf("%v: is not ErrInvalid and its cause", err)
		}
		if n := strings.Count(err.Error(), "invalid argument"); n != 1 || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: says %d times that it is one, want once, and %q", err, n, tc.want)
		}
	}
}
