package shimd

import (
	"bytes"
	"strconv"

	"golang.org/x/sys/unix"
)

// killTree kills a process and its descendants. They are stopped from the top
// down first, until a pass finds no more of them: a stopped parent neither
// forks nor reaps, so that the numbers stay true until all are killed. Processes
// that left the tree, as daemons do, are not found. Without /proc/…/children
// (CONFIG_PROC_CHILDREN) only pid itself is killed.
func killTree(pid int) {
	tree := []int{pid}
	unix.Kill(pid, unix.SIGSTOP)
	for pass := 0; pass < 100; pass++ {
		before := len(tree)
		for i := 0; i < len(tree) && len(tree) < maxTree; i++ {
			tree = appendChildren(tree, tree[i], unix.SIGSTOP)
		}
		if len(tree) == before && pass > 0 {
			break
		}
	}
	for i := len(tree) - 1; i >= 0; i-- {
		unix.Kill(tree[i], unix.SIGKILL)
	}
}

const maxTree = 1 << 16 // processes

// signalTree sends sig to pid and those of its descendants that it finds.
func signalTree(pid int, sig unix.Signal) {
	tree := []int{pid}
	unix.Kill(pid, sig)
	for i := 0; i < len(tree) && len(tree) < maxTree; i++ {
		tree = appendChildren(tree, tree[i], sig)
	}
}

// appendChildren sends sig to the children of pid that are new, and appends
// them.
func appendChildren(tree []int, pid int, sig unix.Signal) []int {
	task := "/proc/" + strconv.Itoa(pid) + "/task"
	eachDir(task, func(tid string) {
		b, err := readFile(task+"/"+tid+"/children", 1<<20)
		if err != nil {
			return
		}
		for _, child := range fields(b) {
			if !contains(tree, child) {
				unix.Kill(child, sig)
				tree = append(tree, child)
			}
		}
	})
	return tree
}

func contains(list []int, v int) bool {
	for _, x := range list {
		if x == v {
			return true
		}
	}
	return false
}

// fields returns the process IDs in b, which white space separates.
func fields(b []byte) (pids []int) {
	for _, f := range bytes.Fields(b) {
		if pid, err := strconv.Atoi(string(f)); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// killCgroups kills every process in the cgroups and those below. It returns
// true while some were found, as they may take their time or have forked.
func killCgroups(dirs []string, self int) (found bool) {
	for _, dir := range dirs {
		if populated(dir) {
			found = true
			if writeFile(dir+"/cgroup.kill", "1") == nil {
				continue
			}
			signalCgroup(dir, unix.SIGKILL, self, 0)
		}
	}
	return found
}

// populated tells whether a process is in the cgroup or below it.
func populated(dir string) bool {
	if b, err := readFile(dir+"/cgroup.events", 4096); err == nil {
		return bytes.Contains(b, []byte("populated 1"))
	}
	return signalCgroup(dir, 0, 0, 0) > 0
}

func signalCgroups(dirs []string, sig unix.Signal, self int) {
	done := 0
	for _, dir := range dirs {
		// The directories of cgroup v1 name one set of processes, in
		// several hierarchies: the first one that has them is enough.
		if done += signalCgroup(dir, sig, self, 0); done > 0 {
			return
		}
	}
}

// signalCgroup sends sig, 0 for none, to the processes in a cgroup and below,
// except self, and returns how many there are.
func signalCgroup(dir string, sig unix.Signal, self, depth int) (n int) {
	b, err := readFile(dir+"/cgroup.procs", 1<<20)
	if err != nil {
		return 0
	}
	for _, pid := range fields(b) {
		if pid != self {
			n++
			if sig != 0 {
				unix.Kill(pid, sig)
			}
		}
	}
	if depth >= 32 {
		return n
	}
	var below []string
	eachDir(dir, func(name string) { below = append(below, name) })
	for _, name := range below {
		n += signalCgroup(dir+"/"+name, sig, self, depth+1)
	}
	return n
}
