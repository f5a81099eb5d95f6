package main

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"strings"
)

// completion prints a script that completes verbs, flags and, by asking berthd, images.
func completion(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(_ context.Context, args []string) error {
		if args[0] != "bash" {
			return fmt.Errorf("shell %q: only bash is known: %w", args[0], errUsage)
		}
		var groups []string
		var cases strings.Builder
		second := map[string][]string{}
		for _, v := range verbs {
			first, rest, _ := strings.Cut(v.name, " ")
			if !slices.Contains(groups, first) {
				groups = append(groups, first)
			}
			if rest != "" {
				second[first] = append(second[first], rest)
			}
			fs := (&app{}).flags(v)
			v.setup(&app{}, fs)
			var names []string
			fs.VisitAll(func(f *flag.Flag) { names = append(names, "--"+f.Name) })
			fmt.Fprintf(&cases, "    %q) flags=%q ;;\n", v.name, strings.Join(names, " "))
		}
		var seconds strings.Builder
		for _, g := range groups {
			if words := second[g]; len(words) > 0 {
				fmt.Fprintf(&seconds, "    %s) COMPREPLY=($(compgen -W %q -- \"$cur\")); return ;;\n", g, strings.Join(words, " "))
			}
		}
		_, err := fmt.Fprintf(a.out, bashScript, strings.Join(groups, " "), seconds.String(), cases.String())
		return err
	}
}

const bashScript = `# bash completion for berth; made by "berth completion bash"
_berth() {
  local cur="${COMP_WORDS[COMP_CWORD]}" verb="${COMP_WORDS[1]}" flags=""
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W %[1]q -- "$cur")); return; fi
  if [ "$COMP_CWORD" = 2 ]; then case "$verb" in
%[2]s  esac; fi
  case "$verb" in image|config|registry) verb="$verb ${COMP_WORDS[2]}" ;; esac
  case "$verb" in
%[3]s  esac
  case "$cur" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$cur")) ;;
    *) case "$verb" in
      "image import"|"config validate") COMPREPLY=($(compgen -f -- "$cur")) ;;
      image*) COMPREPLY=($(compgen -W "$(berth image ls 2>/dev/null | awk 'NR>1 {print $1}')" -- "$cur")); __ltrimcolon_completions "$cur" 2>/dev/null ;;
    esac ;;
  esac
}
complete -F _berth berth
`
