package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

// The rules of iptables that the plugins bridge (masquerading) and portmap make bear
// the pod's ID in a comment. Those of a pod that is gone cannot be removed by DEL
// if the interface or the addresses that a plugin would find them by are gone, too.

// families are the programs that print and take the rules.
var families = []struct{ name, save, restore string }{
	{"IPv4", "iptables-save", "iptables-restore"},
	{"IPv6", "ip6tables-save", "ip6tables-restore"},
}

// ruleID finds the IDs of pods in a rule: they are 64 hexadecimal digits.
var ruleID = regexp.MustCompile(`\b[0-9a-f]{64}\b`)

// maxRules bounds the text of all rules of a family in bytes.
const maxRules = 64 << 20

// saveLimit is how long the printing of the rules of a family may take.
const saveLimit = 10 * time.Second

// rule is a line of iptables-save that makes one.
type rule struct {
	table, chain string
	text         string // behind "-A "
	target       string // the chain that it jumps to, "" for none of the plugins'
}

// rules are the traces of pods in iptables, one for each pod and family.
func (n *Network) rules(ctx context.Context) ([]Trace, error) {
	var out []Trace
	var errs []error
	for i, f := range families {
		all, err := savedRules(ctx, f.save)
		errs = append(errs, err)
		byID := map[string][]rule{}
		for _, r := range all {
			for _, id := range slices.Compact(ruleID.FindAllString(r.text, -1)) {
				byID[id] = append(byID[id], r)
			}
		}
		for _, id := range slices.Sorted(maps.Keys(byID)) {
			out = append(out, Trace{PodID: id, Kind: TraceRules, What: f.name + ": " + places(byID[id]),
				Remove: func(ctx context.Context) error { return n.dropRules(ctx, i, id) }})
		}
	}
	return out, errors.Join(errs...)
}

// places names the chains that rules are in.
func places(rules []rule) string {
	var in []string
	for _, r := range rules {
		if c := r.table + " " + r.chain; !slices.Contains(in, c) {
			in = append(in, c)
		}
	}
	return fmt.Sprintf("%d rules in %s", len(rules), clip(strings.Join(in, ", ")))
}

// savedRules lists the rules of a family; without the program there are none.
func savedRules(ctx context.Context, save string) ([]rule, error) {
	path, err := exec.LookPath(save)
	if err != nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, saveLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path)
	cmd.WaitDelay = pipeGrace
	out, errOut := &boundedBuffer{limit: maxRules}, &boundedBuffer{limit: maxDiagnostic}
	cmd.Stdout, cmd.Stderr = out, errOut
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", save, err, clip(errOut.buf.String()))
	}
	if out.dropped > 0 {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", save, ErrOutputTooLarge, maxRules)
	}
	return parseRules(out.buf.Bytes()), nil
}

// parseRules reads the output of iptables-save(8), and returns the rules in and to
// chains of the plugins, of which a node may have few among many. It is pure.
func parseRules(text []byte) []rule {
	var out []rule
	table := ""
	for line := range bytes.Lines(text) {
		s := strings.TrimSpace(string(line))
		if name, ok := strings.CutPrefix(s, "*"); ok {
			table = name
		}
		body, ok := strings.CutPrefix(s, "-A ")
		if !ok || !strings.Contains(body, "CNI-") {
			continue
		}
		r := rule{table: table, text: body}
		r.chain, _, _ = strings.Cut(body, " ")
		if _, to, ok := strings.Cut(body, " -j CNI-"); ok {
			to, _, _ = strings.Cut(to, " ")
			r.target = "CNI-" + to
		}
		out = append(out, r)
	}
	return out
}

// undoRules is what iptables-restore --noflush is told to remove the rules that bear
// an ID, and the chains of the plugins that only they lead to; "" for nothing to do.
// The rules are in the form in which they were printed. It is pure.
func undoRules(all []rule, id string) string {
	bears := func(r rule) bool { return slices.Contains(ruleID.FindAllString(r.text, -1), id) }
	script := map[string][]string{} // by table
	chains := map[[2]string]bool{}  // table and chain
	for _, r := range all {
		if bears(r) && r.target != "" {
			chains[[2]string{r.table, r.target}] = true
		}
	}
	for _, r := range all {
		if !bears(r) && r.target != "" {
			delete(chains, [2]string{r.table, r.target})
		}
	}
	for _, r := range all {
		if bears(r) && !chains[[2]string{r.table, r.chain}] {
			script[r.table] = append(script[r.table], "-D "+r.text)
		}
	}
	for _, verb := range []string{"-F ", "-X "} {
		for _, c := range slices.SortedFunc(maps.Keys(chains), func(a, b [2]string) int { return strings.Compare(a[1], b[1]) }) {
			script[c[0]] = append(script[c[0]], verb+c[1])
		}
	}
	var b strings.Builder
	for _, table := range slices.Sorted(maps.Keys(script)) {
		fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", table, strings.Join(script[table], "\n"))
	}
	return b.String()
}

// dropRules has the plugins detach the pod, and removes what they leave.
func (n *Network) dropRules(ctx context.Context, family int, id string) error {
	f := families[family]
	all, err := savedRules(ctx, f.save)
	if err != nil || undoRules(all, id) == "" {
		return err
	}
	detached := n.Detach(ctx, Pod{ID: id})
	if all, err = savedRules(ctx, f.save); err != nil {
		return errors.Join(detached, err)
	}
	script := undoRules(all, id)
	if script == "" {
		return nil // a plugin that complained has removed them all the same
	}
	path, err := exec.LookPath(f.restore)
	if err != nil {
		return errors.Join(detached, fmt.Errorf("rules: %w", err))
	}
	cmd := exec.CommandContext(ctx, path, "--noflush", "--wait", "5")
	cmd.WaitDelay = pipeGrace
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return errors.Join(detached, fmt.Errorf("%s: %w: %s", f.restore, err, clip(string(out))))
	}
	return nil
}
