// Command berth-shim stays with one container for as long as that lives. It is
// started by berthd, never by hand: berth-shim <socket> <container ID>, with a
// connection as its descriptor 3. See packages shim and shim/shimd.
package main

import "github.com/berthd/berth/shim/shimd"

func main() { shimd.Main() }
