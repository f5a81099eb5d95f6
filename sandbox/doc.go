// Package sandbox is the domain of berth: pods (the CRI's pod sandboxes) and
// the containers in them, their states, and how they come and go.
//
// # Vocabulary
//
//   - A pod is a set of pinned namespaces, an attachment to networks, a few
//     files and a cgroup. It has no process, unless its containers share a PID
//     namespace: then it has an init, a container of its own kind.
//   - A container is a process tree in a pod, with a writable layer, a bundle and
//     a shim that outlives this daemon.
//   - A row is the record of a pod or container in the book; the view is the
//     immutable picture of all rows that readers use.
//   - An operation is one call's work on one object, a list of steps.
//   - destroy undoes an object, whatever of it exists: after an error, for Stop
//     and Remove, and after a crash.
//
// # Order
//
// A row is written before the first effect of its object, with an ID from which
// all names of effects derive, and again when the object is usable; it goes when
// destroy has succeeded in every step. So at each moment the book knows of at
// least what exists, and what exists beyond the book has leaked (sweep).
//
// # Locks
//
// Readers take none: they load the view. Operations exclude one another by
// object (ops); rows change under a lock by ID and in a transaction that reads
// the row anew (book). No lock is held while an effect runs, but for the slot of
// the operation itself.
package sandbox
