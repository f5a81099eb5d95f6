package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// CDI devices (Container Device Interface): files that vendors put into the
// directories of Config.CDISpecDirs tell what a device means for a container's
// specification. The directories are watched; they need not exist.

const (
	maxCDI     = 1024 // devices of one container
	maxCDIText = 2048 // bytes of what is wrong with specification files
)

// newCDI is nil when no directory is configured.
func newCDI(dirs []string) (*cdi.Cache, error) {
	if len(dirs) == 0 {
		return nil, nil
	}
	c, err := cdi.NewCache(cdi.WithSpecDirs(dirs...), cdi.WithAutoRefresh(true))
	if err != nil {
		return nil, fmt.Errorf("CDI: %w", err)
	}
	return c, nil
}

// cdiNames are the devices that a container asks for, in CDI_devices and then in
// annotations by their keys, each once.
func cdiNames(cfg *runtime.ContainerConfig) ([]string, error) {
	var out []string
	add := func(field, name string) error {
		if _, _, _, err := parser.ParseQualifiedName(name); err != nil {
			return fmt.Errorf("%w: %s: %.200q: want vendor/class=device: %w", ErrInvalid, field, name, err)
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
		if len(out) > maxCDI {
			return fmt.Errorf("%w: %s: more than %d devices", ErrInvalid, field, maxCDI)
		}
		return nil
	}
	for i, d := range cfg.GetCDIDevices() {
		if err := add(fmt.Sprintf("CDI_devices[%d]", i), d.GetName()); err != nil {
			return nil, err
		}
	}
	notes := cfg.GetAnnotations()
	for _, key := range slices.Sorted(maps.Keys(notes)) {
		if !strings.HasPrefix(key, cdi.AnnotationPrefix) {
			continue
		}
		for name := range strings.SplitSeq(notes[key], ",") {
			if err := add(fmt.Sprintf("annotations[%.200q]", key), name); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// checkCDI makes sure that the devices are known.
func (s *Service) checkCDI(names []string) error {
	if len(names) == 0 {
		return nil
	}
	if s.cdi == nil {
		return fmt.Errorf("%w: CDI device %.200q: CDI is off, cdi_spec_dirs is empty", ErrInvalid, names[0])
	}
	if slices.ContainsFunc(names, func(n string) bool { return s.cdi.GetDevice(n) == nil }) {
		// A file may have been written a moment ago, and the news of it be
		// on its way yet: configuring the cache has it read everything.
		if err := s.cdi.Configure(cdi.WithSpecDirs(s.cdi.GetSpecDirectories()...)); err != nil {
			return fmt.Errorf("CDI: %w", err)
		}
	}
	for _, n := range names {
		if s.cdi.GetDevice(n) == nil {
			return fmt.Errorf("%w: CDI device %.200q: not in %s%s", ErrInvalid, n, strings.Join(s.cdi.GetSpecDirectories(), ", "), s.cdiFaults())
		}
	}
	return nil
}

// cdiFaults tells what is wrong with specification files: a device is missing
// most often because its file was not understood.
func (s *Service) cdiFaults() string {
	faults := s.cdi.GetErrors()
	var b strings.Builder
	for _, file := range slices.Sorted(maps.Keys(faults)) {
		fmt.Fprintf(&b, "; %s: %v", file, errors.Join(faults[file]...))
	}
	return strings.ReplaceAll(b.String()[:min(b.Len(), maxCDIText)], "\n", ", ")
}

// injectCDI changes a specification as the devices' files say.
func (s *Service) injectCDI(sp *specs.Spec, names []string) error {
	if len(names) == 0 {
		return nil
	}
	if _, err := s.cdi.InjectDevices(sp, names...); err != nil {
		return fmt.Errorf("%w: CDI devices %.1000s: %w", ErrInvalid, strings.Join(names, ", "), err)
	}
	return nil
}
