package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"strings"
)

// verb is one command.
type verb struct {
	name        string // one word or two
	args        string // operands, for the usage
	least, most int    // how many; most -1 is any number
	short       string // one line
	long        string // more of it
	examples    []string
	// setup adds the verb's own flags and returns what it does.
	setup func(*app, *flag.FlagSet) func(context.Context, []string) error
}

// verbs are all of them, in the order of the overview.
var verbs []*verb

func init() {
	verbs = []*verb{
		{name: "image ls", args: "[IMAGE]", most: 1, short: "list images", setup: imageList,
			examples: []string{"berth image ls", "berth image ls --json | jq -r '.[] | select(.pinned) | .id'"}},
		{name: "image pull", args: "IMAGE", least: 1, most: 1, short: "pull an image from a registry", setup: imagePull,
			long: "Joins a pull of the same image that is under way. The pull goes on for a while if this command is ended.",
			examples: []string{"berth image pull registry.example/app:1.2", "berth image pull --pin registry.example/base:1",
				"berth image pull --user bob --password-stdin registry.example/app < secret"}},
		{name: "image pulls", short: "show the pulls and imports under way", setup: imagePulls,
			long:     "With the present rate, the hosts that send, and what most of the time goes into: network, cpu or disk.",
			examples: []string{"watch -n1 berth image pulls", "berth image pulls --layers"}},
		{name: "image rm", args: "IMAGE...", least: 1, most: -1, short: "remove images, by ID with all their names", setup: imageRemove,
			long:     "The layers of an image that containers use stay until those are gone.",
			examples: []string{"berth image rm registry.example/app:1.1", "berth image rm --force sha256:0a1b2c3d4e5f"}},
		{name: "image import", args: "FILE|DIRECTORY|-...", least: 1, most: -1, short: "take images from archives", setup: imageImport,
			long: "An archive is an OCI image layout or what \"docker save\" writes: a tar file, plain or compressed with gzip or zstd, or a directory; \"-\" reads one from standard input. " +
				"It may hold several images. Layers that are on the node already are not read again.",
			examples: []string{"berth image import app.tar", "berth image import --pin base.tar.zst ./layout",
				"docker save app:1 | berth image import -", "berth image import --name registry.example/app ./layout"}},
		{name: "image export", args: "IMAGE...", least: 1, most: -1, short: "write images to an archive", setup: imageExport,
			long: "The archive is an OCI image layout that \"docker load\" reads as well; compress it with a pipe. Layers are written from what is unpacked: the content is the same, while digests and the image ID are new. " +
				"With --original they are fetched from the registry again, so that the copy has the digests and the ID of the image.",
			examples: []string{"berth image export -o app.tar registry.example/app:1.2", "berth image export --original registry.example/app:1.2 | zstd > app.tar.zst"}},
		{name: "image verify", args: "[IMAGE...]", most: -1, short: "compare images with what was unpacked", setup: imageVerify,
			long: "Every file of every layer, of all images or of those that are named, is compared with the list that was written when the layer was unpacked. " +
				"With --repair a damaged layer, and no other, is fetched again; containers that run keep what they have until they are removed. " +
				"Exit code 5 tells of damage that is still there.",
			examples: []string{"berth image verify", "berth image verify --quick", "berth image verify --repair registry.example/app:1.2"}},
		{name: "image pin", args: "IMAGE...", least: 1, most: -1, short: "keep images from being removed by the kubelet", setup: imagePin(true),
			long:     "A pin belongs to the image, not to its name, and survives restarts. To pin by name, use pinned_images in the configuration.",
			examples: []string{"berth image pin registry.example/base:1"}},
		{name: "image unpin", args: "IMAGE...", least: 1, most: -1, short: "take pins away", setup: imagePin(false),
			examples: []string{"berth image unpin registry.example/base:1"}},
		{name: "registry explain", args: "IMAGE", least: 1, most: 1, short: "show where a pull would look, and with what", setup: registryExplain,
			long:     "Prints the endpoints in the order in which they would be tried, with the files that decided so, credentials and TLS files. Nothing is pulled.",
			examples: []string{"berth registry explain nginx", "berth registry explain --probe registry.example/app:1.2"}},
		{name: "doctor", short: "check whether the node is fit for berthd, and say what to do where it is not", setup: doctor,
			long: "Kernel, control groups, OCI runtimes, network, disks, permissions, limits, clock, sockets and configuration, and the daemon if one runs. An error keeps berthd from starting or pods from running, " +
				"a warning will do so some day, a note is something that the node does not have. Nothing is changed. Exit code 5 tells of errors.",
			examples: []string{"berth doctor", "berth doctor --quiet", "berth doctor --config ./berth.toml --json | jq '.checks[] | select(.level == \"error\")'"}},
		{name: "ops", short: "show what berthd is doing: which object, at which step, since when", setup: showOps,
			long: "Calls are CRI requests that are not answered yet, operations the work that they wait for or have given up waiting for: such work goes on, and the next call joins it. " +
				"Sessions are execs, attaches and port-forwards, background is what berthd does of itself. FOR is how long the step has lasted. While no berthd runs, it is what the book has as begun and not as done: the next berthd undoes or finishes that.",
			examples: []string{"berth ops", "watch -n1 berth ops --calls=false", "berth ops --older 30s --json"}},
		{name: "leaks", short: "list what belongs to berth and has no owner", setup: leaks,
			long: "Processes, namespaces, mounts, control groups, addresses, rules of iptables, sockets, directories, layers and rows that no pod, container or image has, with the reason and the age. " +
				"What operations under way are making is theirs. With --fix it is removed where that is safe. While berthd does not run, its program looks by itself, and no berthd can start meanwhile. " +
				"Exit code 5 tells that something is still there.",
			examples: []string{"berth leaks", "berth leaks --fix", "berth leaks --json | jq '.findings[].what'"}},
		{name: "check", short: "compare the book with itself and with the node", setup: check,
			long: "Pages and rows of the book; pods and containers that it calls alive with their namespaces, shims, processes, control groups, files and notes; snapshots with their directories; images with their layers, whose contents \"image verify\" compares. " +
				"Each deviation is shown with its consequence and its remedy. With --repair it is put right where that is safe: states are recorded, notes written anew, unreadable rows dropped with a copy. " +
				"While berthd does not run, its program looks by itself and changes nothing; with --repair it does first what a start of berthd does. Exit code 5 tells that something is still wrong.",
			examples: []string{"berth check", "berth check --repair", "berth check --json | jq '.findings[] | {id, why}'"}},
		{name: "config default", short: "print a configuration file with every key and its default", setup: configDefault,
			examples: []string{"berth config default > /etc/berth/berth.toml"}},
		{name: "config validate", args: "[FILE]", most: 1, short: "check a configuration file and its drop-ins", setup: configValidate,
			examples: []string{"berth config validate", "berth config validate ./berth.toml"}},
		{name: "config print", short: "print the configuration in force", setup: configPrint,
			long:     "As a file with the keys that differ from the defaults; with --json all keys.",
			examples: []string{"berth config print", "berth config print --json | jq .state_dir"}},
		{name: "version", short: "print the versions of berth and berthd", setup: versionVerb,
			examples: []string{"berth version --json"}},
		{name: "completion", args: "bash", least: 1, most: 1, short: "print a completion script for a shell", setup: completion,
			examples: []string{"berth completion bash > /etc/bash_completion.d/berth"}},
	}
}

func (v *verb) usage() string {
	return strings.TrimRight(v.name+" [flags] "+v.args, " ")
}

// help explains a verb.
func (v *verb) help(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprintf(w, "berth %s: %s\n\nUsage: berth %s\n", v.name, v.short, v.usage())
	if v.long != "" {
		fmt.Fprintf(w, "\n%s\n", strings.Join(wrap(v.long, 78), "\n"))
	}
	fmt.Fprint(w, "\nFlags:\n")
	fs.VisitAll(func(f *flag.Flag) {
		name, usage := flag.UnquoteUsage(f)
		fmt.Fprintf(w, "  %-24s %s\n", strings.TrimSpace("--"+f.Name+" "+name), usage)
	})
	fmt.Fprint(w, "\nExamples:\n")
	for _, e := range v.examples {
		fmt.Fprintf(w, "  %s\n", e)
	}
}

// overview lists the verbs, or those of one group.
func overview(w io.Writer, group string) {
	fmt.Fprint(w, "berth: administer the container runtime berthd of this node\n\nUsage: berth COMMAND [flags] [arguments]\n\n")
	for _, v := range verbs {
		if group == "" || strings.HasPrefix(v.name, group+" ") {
			fmt.Fprintf(w, "  %-18s %s\n", v.name, v.short)
		}
	}
	fmt.Fprint(w, "\nberth COMMAND --help tells more, with examples. Every command knows --json.\n"+
		"Exit codes: 0 done, 1 failed, 2 wrong command line, 3 berthd not reachable, 4 image not found, 5 what was found is still there.\n")
}

// wrap breaks text at spaces into lines of at most width bytes.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}
