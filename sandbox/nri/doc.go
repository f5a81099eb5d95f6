// Package nri lets plugins of the Node Resource Interface (NRI,
// github.com/containerd/nri) see and adjust pods and containers.
//
// # Vocabulary
//
//   - A plugin is a program that connects to a socket, or that is started from
//     a directory. It subscribes to events and may answer some with adjustments
//     of a container that is being made, or with updates of others.
//   - The [Host] talks to plugins. The [Node] is who it does that for.
//   - A plugin is synchronised when it connects: it is told once of all that
//     there is, and from then on of every change.
//   - The turn is the right to talk to plugins.
//
// # Turns
//
// Plugins are written for one request at a time, so whoever has something for
// them waits for the turn, in order. A synchronisation takes a turn as well, and
// keeps it until the plugin is among those that get events. So nothing is lost
// and nothing told twice: what was announced before the turn is part of the
// synchronisation, as far as it may have come, and what comes after is an event.
//
// A turn is short: the time of a plugin is bounded, a plugin that exceeds it is
// disconnected unless it asked not to be, and what plugins want is carried out in
// bounded time. A turn never includes the work of an OCI runtime on a container
// that is made, started, stopped or updated on request, nor that of a network
// plugin. Waiting for it ends with the caller's context.
//
// # What is told
//
// Plugins are told of the end of exactly what they were told of before: a stop
// and a removal once each, in this order, also when a container ends by itself,
// and when its making was given up after they had heard of it.
//
// # Caveats
//
// The library keeps two settings, its time limits and its logger, for the whole
// process, so there can be one Host in a process at a time. It defines
// evictions, and drops them (version 0.12). WebAssembly plugins are left out at
// build time (tag nri_no_wasm): their runtime would be a tenth of the daemon.
package nri
