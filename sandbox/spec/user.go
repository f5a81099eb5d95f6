package spec

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxID is the highest user or group ID that is accepted. The kernel would
	// take 32 bits, but the peers, and the programs in containers, compute with
	// signed ones: IDs that wrapped around became root (CVE-2024-40635).
	maxID = math.MaxInt32

	// maxGroups is the kernel's own limit for setgroups(2), NGROUPS_MAX.
	maxGroups = 65536
)

// User is the identity of a container's process.
type User struct {
	UID, GID uint32
	// AdditionalGIDs has GID itself first, then the others in ascending
	// order, none twice: what getgroups(2) will answer.
	AdditionalGIDs []uint32
}

// ResolveUser decides who runs a container: run_as_user or run_as_username of
// the security context if there is one, else the user of the image (see
// [Image]), else root. The primary group is run_as_group, else the group that
// the image names with its user, else the one in passwd, else 0.
//
// A number is only ever a number: it is not looked up as a name, and what looks
// like a number but is not a plain decimal in 0..2147483647 is refused, so
// that neither "+0" nor a passwd line called "1000" makes anybody root
// (CVE-2024-40635, CVE-2026-46680).
//
// passwd and group are the contents of the files in the container's root, nil
// where there is none; their size is the caller's to bound. Their malformed lines
// are skipped. With the Merge policy the groups that list the user in the group
// file are added, with Strict only those of the security context.
func ResolveUser(sc *runtime.LinuxContainerSecurityContext, imageUser string, passwd, group []byte) (User, error) {
	who, err := requested(sc, imageUser)
	if err != nil {
		return User{}, err
	}
	u, name, err := who.lookup(passwd, group)
	if err != nil {
		return User{}, err
	}
	if v := sc.GetRunAsGroup(); v != nil {
		if u.GID, err = checkID("linux.security_context.run_as_group", v.Value); err != nil {
			return User{}, err
		}
	}
	if u.AdditionalGIDs, err = additionalGroups(sc, u.GID, name, group); err != nil {
		return User{}, err
	}
	return u, nil
}

// principal is a user as requested and not looked up yet.
type principal struct {
	field string // where it comes from, for errors
	user  string // name or number
	group string // name or number, "" if not given
}

// requested picks the source of the user and refuses contradictions.
func requested(sc *runtime.LinuxContainerSecurityContext, imageUser string) (principal, error) {
	uid, name := sc.GetRunAsUser(), sc.GetRunAsUsername()
	switch {
	case uid != nil && name != "":
		return principal{}, fmt.Errorf("%w: linux.security_context.run_as_user %d and run_as_username %q: only one may be set", ErrInvalid, uid.Value, name)
	case uid == nil && name == "" && sc.GetRunAsGroup() != nil:
		return principal{}, fmt.Errorf("%w: linux.security_context.run_as_group %d: needs run_as_user or run_as_username", ErrInvalid, sc.GetRunAsGroup().Value)
	case uid != nil:
		id, err := checkID("linux.security_context.run_as_user", uid.Value)
		return principal{field: "linux.security_context.run_as_user", user: strconv.FormatUint(uint64(id), 10)}, err
	case name != "":
		return principal{field: "linux.security_context.run_as_username", user: name}, nil
	case imageUser == "":
		return principal{field: "image user", user: "0"}, nil
	}
	user, grp, hasGroup := strings.Cut(imageUser, ":")
	if user == "" || hasGroup && grp == "" {
		return principal{}, fmt.Errorf("%w: image user %q: want user or user:group", ErrInvalid, clip(imageUser))
	}
	return principal{field: "image user", user: user, group: grp}, nil
}

// lookup finds the IDs, and the name that the group file knows the user by: ""
// for a number without a passwd line.
func (p principal) lookup(passwd, group []byte) (u User, name string, err error) {
	id, numeric, err := parseID(p.field, p.user)
	if err != nil {
		return User{}, "", err
	}
	u.UID = id
	account, found := findAccount(passwd, func(a account) bool {
		if numeric {
			return a.uid == id
		}
		return a.name == p.user
	})
	switch {
	case found:
		u.UID, u.GID, name = account.uid, account.gid, account.name
	case !numeric:
		return User{}, "", fmt.Errorf("%w: %s %q: no such user in the container's /etc/passwd", ErrInvalid, p.field, clip(p.user))
	}
	if p.group != "" {
		u.GID, err = lookupGroup(p.field, p.group, group)
	}
	return u, name, err
}

func lookupGroup(field, want string, group []byte) (uint32, error) {
	id, numeric, err := parseID(field+" group", want)
	if err != nil || numeric {
		return id, err
	}
	found := false
	eachGroup(group, func(name string, gid uint32, _ []byte) bool {
		if name == want {
			id, found = gid, true
		}
		return !found
	})
	if !found {
		return 0, fmt.Errorf("%w: %s group %q: no such group in the container's /etc/group", ErrInvalid, field, clip(want))
	}
	return id, nil
}

// additionalGroups returns the supplementary groups by the policy of sc. The
// primary group is always among them: a process that drops it must not lose
// what it denies (CVE-2022-2995).
func additionalGroups(sc *runtime.LinuxContainerSecurityContext, gid uint32, name string, group []byte) ([]uint32, error) {
	var gids []uint32
	for i, v := range sc.GetSupplementalGroups() {
		id, err := checkID(fmt.Sprintf("linux.security_context.supplemental_groups[%d]", i), v)
		if err != nil {
			return nil, err
		}
		gids = append(gids, id)
	}
	switch policy := sc.GetSupplementalGroupsPolicy(); policy {
	case runtime.SupplementalGroupsPolicy_Merge:
		if name != "" {
			gids = append(gids, groupsOf(name, group)...)
		}
	case runtime.SupplementalGroupsPolicy_Strict:
	default:
		return nil, fmt.Errorf("%w: linux.security_context.supplemental_groups_policy %d: want Merge (0) or Strict (1)", ErrInvalid, policy)
	}
	slices.Sort(gids)
	gids = slices.DeleteFunc(slices.Compact(gids), func(id uint32) bool { return id == gid })
	gids = slices.Insert(gids, 0, gid)
	if len(gids) > maxGroups {
		return nil, fmt.Errorf("%w: supplementary groups: %d, the limit is %d", ErrInvalid, len(gids), maxGroups)
	}
	return gids, nil
}

func groupsOf(name string, group []byte) (gids []uint32) {
	eachGroup(group, func(_ string, gid uint32, members []byte) bool {
		for m := range bytes.SplitSeq(members, []byte(",")) {
			if string(bytes.TrimSpace(m)) == name {
				gids = append(gids, gid)
				break
			}
		}
		return true
	})
	return gids
}

// ImageUser tells what an image status says about the user of an image
// configuration, by the rules of [ResolveUser]: a number as uid, and anything
// else as name. The kubelet decides by it whether runAsNonRoot holds; a uid is
// never given for a user that ResolveUser would refuse.
func ImageUser(user string) (uid *int64, name string) {
	name, _, _ = strings.Cut(user, ":")
	if name == "" {
		return nil, ""
	}
	if id, numeric, err := parseID("", name); err == nil && numeric {
		v := int64(id)
		return &v, ""
	}
	return nil, name
}

// parseID reads s as an ID if it looks like a number at all. A name can not
// begin with a digit or a sign, which is what keeps the two apart.
func parseID(field, s string) (id uint32, numeric bool, err error) {
	if s == "" || strings.IndexByte("+-0123456789", s[0]) < 0 {
		if i := strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == ':' }); i >= 0 {
			return 0, false, fmt.Errorf("%w: %s %q: space, colon or control character at byte %d", ErrInvalid, field, clip(s), i)
		}
		return 0, false, nil
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false, fmt.Errorf("%w: %s %q: neither a name nor a plain decimal number", ErrInvalid, field, clip(s))
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > maxID {
		return 0, false, fmt.Errorf("%w: %s %s: the limit is %d", ErrInvalid, field, clip(s), maxID)
	}
	return uint32(n), true, nil
}

func checkID(field string, v int64) (uint32, error) {
	if v < 0 || v > maxID {
		return 0, fmt.Errorf("%w: %s %d: not in 0..%d", ErrInvalid, field, v, maxID)
	}
	return uint32(v), nil
}

type account struct {
	name     string
	uid, gid uint32
}

// findAccount returns the first usable line of a passwd file (passwd(5):
// name:password:uid:gid:…) that is wanted.
func findAccount(passwd []byte, want func(account) bool) (account, bool) {
	for line := range bytes.Lines(passwd) {
		f := bytes.SplitN(bytes.TrimRight(line, "\r\n"), []byte(":"), 5)
		if len(f) < 4 || len(f[0]) == 0 {
			continue
		}
		uid, ok1 := fileID(f[2])
		gid, ok2 := fileID(f[3])
		a := account{name: string(f[0]), uid: uid, gid: gid}
		if ok1 && ok2 && want(a) {
			return a, true
		}
	}
	return account{}, false
}

// Home returns the home directory of the first user with this ID in a passwd
// file, "/" if there is none. It reads the file as runc does, which takes a
// missing or malformed ID for 0 and a missing directory for an empty one.
func Home(passwd []byte, uid uint32) string {
	for line := range bytes.Lines(passwd) {
		if len(line) >= 64<<10 {
			return "/" // wherever it stands
		}
	}
	for line := range bytes.Lines(passwd) {
		f := bytes.Split(bytes.TrimSpace(line), []byte(":"))
		if len(f[0]) == 0 && len(f) == 1 {
			continue
		}
		id, home := 0, ""
		if len(f) > 2 {
			id, _ = strconv.Atoi(string(f[2]))
		}
		if len(f) > 5 {
			home = string(f[5])
		}
		if id == int(uid) {
			return home
		}
	}
	return "/"
}

// eachGroup calls fn with the usable lines of a group file (group(5):
// name:password:gid:members) until it returns false.
func eachGroup(group []byte, fn func(name string, gid uint32, members []byte) bool) {
	for line := range bytes.Lines(group) {
		f := bytes.SplitN(bytes.TrimRight(line, "\r\n"), []byte(":"), 5)
		if len(f) < 3 || len(f[0]) == 0 {
			continue
		}
		gid, ok := fileID(f[2])
		if !ok {
			continue
		}
		var members []byte
		if len(f) > 3 {
			members = f[3]
		}
		if !fn(string(f[0]), gid, members) {
			return
		}
	}
}

// fileID reads an ID of a user database; a line with a number out of range is
// as malformed as one without a number.
func fileID(b []byte) (uint32, bool) {
	id, numeric, err := parseID("", string(b))
	return id, numeric && err == nil
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 128
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
