package spec

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const testPasswd = `root:x:0:0:root:/root:/bin/sh
broken
:x:5:5::/:
notanumber:x:abc:0::/:
huge:x:4294967296:0::/:
wrap:x:2147483648:0::/:
negative:x:-1:0::/:
plus:x:+0:0::/:
1000:x:0:0:numeric name:/root:/bin/sh
app:x:1000:1001:app:/home/app:/bin/sh
twin:x:1000:1:second of an ID:/:
nobody:x:65534:65534::/:
short:x:7:8
`

const testGroup = `root:x:0:root
wheel:x:10:app,root
malformed
badgid:x:x:app
video:x:44: app ,other
app:x:1001:
staff:x:50:nobody
1001:x:0:
nomembers:x:77
`

func id(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }

func TestResolveUser(t *testing.T) {
	type sc = runtime.LinuxContainerSecurityContext
	tests := []struct {
		name  string
		sc    *sc
		image string
		want  User
		err   string // part of the error, "" for none
	}{
		{name: "nobody said anything", want: User{0, 0, []uint32{0, 10}}},
		{name: "image name", image: "app", want: User{1000, 1001, []uint32{1001, 10, 44}}},
		{name: "image number", image: "1000", want: User{1000, 1001, []uint32{1001, 10, 44}}},
		{name: "number without a line", image: "4242", want: User{4242, 0, []uint32{0}}},
		{name: "number and number", image: "4242:4343", want: User{4242, 4343, []uint32{4343}}},
		{name: "name and group name", image: "app:video", want: User{1000, 44, []uint32{44, 10}}},
		{name: "group number is no name", image: "app:1001", want: User{1000, 1001, []uint32{1001, 10, 44}}},
		{name: "leading zeros", image: "0000", want: User{0, 0, []uint32{0, 10}}},
		{name: "highest", image: "2147483647:2147483647", want: User{math.MaxInt32, math.MaxInt32, []uint32{math.MaxInt32}}},
		{name: "line without shell", image: "short", want: User{7, 8, []uint32{8}}},
		{name: "uid wins over the image", sc: &sc{RunAsUser: id(65534)}, image: "app:video", want: User{65534, 65534, []uint32{65534, 50}}},
		{name: "uid zero", sc: &sc{RunAsUser: id(0)}, image: "app", want: User{0, 0, []uint32{0, 10}}},
		{name: "username", sc: &sc{RunAsUsername: "nobody"}, want: User{65534, 65534, []uint32{65534, 50}}},
		{name: "numeric username", sc: &sc{RunAsUsername: "1000"}, want: User{1000, 1001, []uint32{1001, 10, 44}}},
		{name: "group", sc: &sc{RunAsUser: id(1000), RunAsGroup: id(5)}, want: User{1000, 5, []uint32{5, 10, 44}}},
		{name: "merge", sc: &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234, 44, 9, 1234}}, want: User{1000, 1001, []uint32{1001, 9, 10, 44, 1234}}},
		{name: "strict", sc: &sc{RunAsUser: id(1000), SupplementalGroups: []int64{1234, 1001}, SupplementalGroupsPolicy: runtime.SupplementalGroupsPolicy_Strict}, want: User{1000, 1001, []uint32{1001, 1234}}},

		{name: "both", sc: &sc{RunAsUser: id(1), RunAsUsername: "app"}, err: "only one"},
		{name: "group alone", sc: &sc{RunAsGroup: id(1)}, image: "app", err: "run_as_group 1: needs run_as_user"},
		{name: "uid -1", sc: &sc{RunAsUser: id(-1)}, err: "run_as_user -1: not in 0..2147483647"},
		{name: "uid 2^31", sc: &sc{RunAsUser: id(1 << 31)}, err: "run_as_user 2147483648: not in 0..2147483647"},
		{name: "uid 2^32", sc: &sc{RunAsUser: id(1 << 32)}, err: "2147483647"},
		{name: "gid 2^32", sc: &sc{RunAsUser: id(1), RunAsGroup: id(1 << 32)}, err: "run_as_group 4294967296"},
		{name: "supplemental", sc: &sc{SupplementalGroups: []int64{1, -7}}, err: "supplemental_groups[1] -7"},
		{name: "policy", sc: &sc{SupplementalGroupsPolicy: 9}, err: "supplemental_groups_policy 9"},
		{name: "image 2^31", image: "2147483648", err: "image user 2147483648: the limit is 2147483647"},
		{name: "image 2^32", image: "4294967296", err: "the limit is 2147483647"},
		{name: "image 2^64", image: "18446744073709551616", err: "the limit is 2147483647"},
		{name: "image 1e30", image: "1e30", err: `"1e30": neither a name nor`},
		{name: "image +0", image: "+0", err: `"+0": neither a name nor`},
		{name: "image -1", image: "-1", err: `"-1": neither a name nor`},
		{name: "image 0x0", image: "0x0", err: "neither a name nor"},
		{name: "image 0:0x", image: "0:0x", err: `group "0x": neither a name nor`},
		{name: "image 0:+0", image: "0:+0", err: "neither a name nor"},
		{name: "image :0", image: ":0", err: `image user ":0": want user or user:group`},
		{name: "image 0:", image: "0:", err: "want user or user:group"},
		{name: "image a:b:c", image: "app:video:x", err: "colon"},
		{name: "image space", image: " 0", err: "space"},
		{name: "image newline", image: "app\nroot", err: "control character at byte 3"},
		{name: "unknown", image: "ghost", err: `image user "ghost": no such user`},
		{name: "unknown username", sc: &sc{RunAsUsername: "ghost"}, err: `run_as_username "ghost": no such user`},
		{name: "unknown group", image: "app:ghost", err: `group "ghost": no such group`},
		{name: "line with text for ID", image: "notanumber", err: "no such user"},
		{name: "line with 2^32", image: "huge", err: "no such user"},
		{name: "line with 2^31", image: "wrap", err: "no such user"},
		{name: "line with -1", image: "negative", err: "no such user"},
		{name: "line with +0", image: "plus", err: "no such user"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ResolveUser(tt.sc, tt.image, []byte(testPasswd), []byte(testGroup))
			wantErr(t, err, tt.err)
			if got.UID != tt.want.UID || got.GID != tt.want.GID || !slices.Equal(got.AdditionalGIDs, tt.want.AdditionalGIDs) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// wantErr checks for an error with a part of its text, or for none with "".
func wantErr(t *testing.T, err error, part string) {
	t.Helper()
	switch {
	case part == "" && err != nil:
		t.Fatalf("error %v, want none", err)
	case part != "" && err == nil:
		t.Fatalf("no error, want %q", part)
	case part != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), part)):
		t.Fatalf("error %v, want ErrInvalid with %q", err, part)
	}
}

func TestResolveUserWithoutFiles(t *testing.T) {
	got, err := ResolveUser(nil, "12:34", nil, nil)
	if err != nil || got.UID != 12 || got.GID != 34 {
		t.Errorf("got %+v, %v", got, err)
	}
	_, err = ResolveUser(nil, "app", nil, nil)
	wantErr(t, err, "no such user")
}

func TestTooManyGroups(t *testing.T) {
	var group bytes.Buffer
	for i := range maxGroups + 1 {
		fmt.Fprintf(&group, "g%d:x:%d:root\n", i, i)
	}
	_, err := ResolveUser(nil, "root", []byte(testPasswd), group.Bytes())
	wantErr(t, err, "65537, the limit is 65536")
}

func TestImageUser(t *testing.T) {
	for _, tt := range []struct {
		user string
		uid  int64 // -1 for none
		name string
	}{
		{"", -1, ""}, {"0", 0, ""}, {"1000:5", 1000, ""}, {"app", -1, "app"}, {"app:5", -1, "app"},
		{"+0", -1, "+0"}, {"2147483648", -1, "2147483648"}, {"0x0", -1, "0x0"},
	} {
		uid, name := ImageUser(tt.user)
		if name != tt.name || (uid == nil) != (tt.uid < 0) || uid != nil && *uid != tt.uid {
			t.Errorf("ImageUser(%q) = %v, %q", tt.user, uid, name)
		}
	}
}

// FuzzResolveUser: an identity or an error, never both; IDs in range; a user that
// looks like a number gets just that number.
func FuzzResolveUser(f *testing.F) {
	for _, image := range []string{"", "0", "app", "app:video", "+0", "0:0x", "1e30", "4294967296", "1000"} {
		f.Add(image, int64(-1), int64(-1), int64(5), []byte(testPasswd), []byte(testGroup))
	}
	f.Add("", int64(1000), int64(7), int64(1<<32), []byte("a:b:c:d"), []byte("::::"))
	f.Fuzz(func(t *testing.T, image string, uid, gid, sup int64, passwd, group []byte) {
		sc := &runtime.LinuxContainerSecurityContext{SupplementalGroups: []int64{sup}}
		if uid >= 0 {
			sc.RunAsUser = id(uid)
		}
		if gid >= 0 {
			sc.RunAsGroup = id(gid)
		}
		u, err := ResolveUser(sc, image, passwd, group)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error %v is not ErrInvalid", err)
			}
			if u.UID != 0 || u.GID != 0 || u.AdditionalGIDs != nil {
				t.Fatalf("identity %+v beside error %v", u, err)
			}
			return
		}
		if u.UID > maxID || u.GID > maxID || slices.Max(u.AdditionalGIDs) > maxID || u.AdditionalGIDs[0] != u.GID {
			t.Fatalf("%+v out of range", u)
		}
		if uid >= 0 && int64(u.UID) != uid {
			t.Fatalf("run_as_user %d became %d", uid, u.UID)
		}
		name, _, _ := strings.Cut(image, ":")
		if n, ok := ImageUser(name); uid < 0 && ok == "" && n != nil && int64(u.UID) != *n {
			t.Fatalf("image user %q became %d", image, u.UID)
		}
	})
}

func TestHome(t *testing.T) {
	const passwd = "\n#comment\nroot:x:0:0:root:/root:/bin/sh\nshort:x:7\nbad:x:many:0::/bad:\nuser:x:1000:1000::/home/user\nagain:x:1000:1::/other:/bin/sh\n"
	for uid, want := range map[uint32]string{0: "", 7: "", 1000: "/home/user", 5: "/", 4294967295: "/"} {
		if got := Home([]byte(passwd), uid); got != want {
			t.Errorf("user %d: %q, want %q", uid, got, want)
		}
	}
	if got := Home([]byte("root:x:0:0:root:/root:/bin/sh\n"), 0); got != "/root" {
		t.Errorf("root: %q", got)
	}
	if got := Home(append(bytes.Repeat([]byte{'x'}, 64<<10), "\nroot:x:0:0:root:/root:/bin/sh\n"...), 0); got != "/" {
		t.Errorf("behind a long line: %q", got)
	}
}
