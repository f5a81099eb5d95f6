package imageservice

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/containers/image/v5/manifest"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/cpu"
)

// maxIndexDepth is how many indexes may be inside one another.
const maxIndexDepth = 3

// choose finds the node's manifest in an index.
func (s *Service) choose(blob []byte, mime string) (digest.Digest, error) {
	list, err := manifest.ListFromBlob(blob, mime)
	if err != nil {
		return "", fmt.Errorf("index: %w: %w", ErrInvalidImage, err)
	}
	var errs []error
	for _, sys := range s.platforms() {
		chosen, err := list.ChooseInstance(sys)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := chosen.Validate(); err != nil {
			return "", fmt.Errorf("index: digest %.100q: %w: %w", chosen, ErrInvalidImage, err)
		}
		return chosen, nil
	}
	return "", fmt.Errorf("platform %s: %w: %w", s.platform(), ErrUnsupported, errors.Join(errs[:1]...))
}

// platforms are what the node runs, the best choice first. containers/image knows the
// variants of arm. Of amd64 the image for all processors comes first, and one for a level
// of the instruction set only where there is no other.
func (s *Service) platforms() []*types.SystemContext {
	first := s.systemContext()
	out := []*types.SystemContext{first}
	if s.cfg.Architecture != "amd64" {
		return out
	}
	levels := amd64Levels()
	if s.cfg.Variant != "" {
		levels = nil
		for _, l := range []string{"v4", "v3", "v2", "v1"} { // v4 runs what is for v3, and so on
			if l < s.cfg.Variant {
				levels = append(levels, l)
			}
		}
	}
	for _, l := range levels {
		sys := *first
		sys.VariantChoice = l
		out = append(out, &sys)
	}
	return out
}

// amd64Levels are the levels of the x86-64 psABI that this processor has.
func amd64Levels() []string {
	levels := []string{"v1"}
	x := cpu.X86
	if runtime.GOARCH != "amd64" || !(x.HasPOPCNT && x.HasSSE3 && x.HasSSSE3 && x.HasSSE41 && x.HasSSE42) {
		return levels
	}
	levels = append(levels, "v2")
	if !(x.HasAVX && x.HasAVX2 && x.HasBMI1 && x.HasBMI2 && x.HasFMA && x.HasOSXSAVE) {
		return levels
	}
	levels = append(levels, "v3")
	if x.HasAVX512F && x.HasAVX512BW && x.HasAVX512CD && x.HasAVX512DQ && x.HasAVX512VL {
		levels = append(levels, "v4")
	}
	return levels
}

func (s *Service) platform() string {
	p := s.cfg.OS + "/" + s.cfg.Architecture
	if s.cfg.Variant != "" {
		p += "/" + s.cfg.Variant
	}
	return p
}
