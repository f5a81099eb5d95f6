package shim

import "strconv"

// Is tells whether process pid is the shim of container id that listens, or
// listened, on socket. A pid that has been given to another process since is not.
func Is(pid int, socket, id string) bool {
	s, i := shimCommand(strconv.Itoa(pid))
	return i == id && s == socket
}
