// Package registry builds small OCI images in memory and serves them from a
// read-only registry on a loopback port, with faults on request. It exists for
// the tests and the demo: nothing is fetched from anywhere.
//
// The nouns:
//
//   - File, Layer: what goes into one layer, written down as values; a whiteout
//     is a File made by Whiteout or Opaque.
//   - Image: a manifest, a config and layers with their digests, or an index
//     of such images for several platforms (NewIndex).
//   - Server: repositories of images by tag and digest. A Fault set on a
//     repository changes how it answers until it is taken away.
//
// Caveats: blobs live in memory, so images are meant to be small. The same
// Spec always gives the same digests: time stamps are fixed, and so is the
// order of the files.
package registry
