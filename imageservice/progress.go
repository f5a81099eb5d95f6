package imageservice

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/berthd/berth/imageservice/layer"
)

// PullProgress tells what a running pull is doing. It can be sent as JSON; durations are
// nanoseconds there.
type PullProgress struct {
	Reference string    `json:"reference"` // as the first caller wrote it
	Image     string    `json:"image"`     // the full name that is being tried
	Stage     string    `json:"stage"`     // such as "manifest" or "layers 3/8"
	Began     time.Time `json:"began"`
	StageAt   time.Time `json:"stageAt"`
	Waiters   int       `json:"waiters"` // callers; 0 while nobody waits any more
	// TotalBytes and DoneBytes are of the layers that were not there, compressed; 0 before
	// the manifest is read.
	TotalBytes int64           `json:"totalBytes"`
	DoneBytes  int64           `json:"doneBytes"`
	Rate       int64           `json:"rate"`    // bytes per second, over the last seconds
	Limit      string          `json:"limit"`   // what most of the time went into: "network", "cpu", "disk", or ""
	Layers     []LayerProgress `json:"layers"`  // in the order of the image
	Last       string          `json:"problem"` // the last trouble that the pull got over; ""
}

// LayerProgress is one layer of a running pull.
type LayerProgress struct {
	Digest string `json:"digest"`
	// State is "waiting" (for a slot), "pulling", "committing" (unpacked, the layers
	// below are not), "done", or "present" (it was there before).
	State      string `json:"state"`
	TotalBytes int64  `json:"totalBytes"` // compressed
	DoneBytes  int64  `json:"doneBytes"`
	Rate       int64  `json:"rate"`     // bytes per second, over the last seconds
	Endpoint   string `json:"endpoint"` // host that sends it, or sent it
	Retries    int    `json:"retries"`  // connections that broke or stalled
	// Shared: another pull makes the layer, and this one waits for it.
	Shared bool `json:"shared"`
	// Where the time went: waiting for the registry; writing files; and the rest of the
	// unpacker's waiting, which is for decompression and digests.
	Network time.Duration `json:"network"`
	CPU     time.Duration `json:"cpu"`
	Disk    time.Duration `json:"disk"`
	Problem string        `json:"problem"` // why the last connection ended early; ""
}

// The states of a layer.
const (
	layerWaiting    = "waiting"
	layerPulling    = "pulling"
	layerCommitting = "committing"
	layerDone       = "done"
	layerPresent    = "present"
)

// layerRecord is what is noted while a layer is made. All methods may be called at any
// time, also on nil.
type layerRecord struct {
	mu      sync.Mutex
	now     LayerProgress
	meter   meter
	reading time.Time     // since when the unpacker waits for bytes; zero while it writes
	waited  time.Duration // of the unpacker for bytes
	began   time.Time     // of pulling
	ended   time.Time
}

func newLayerRecord(digest string, size int64) *layerRecord {
	return &layerRecord{now: LayerProgress{Digest: digest, State: layerWaiting, TotalBytes: size}}
}

func (r *layerRecord) change(f func(*LayerProgress)) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.now)
}

func (r *layerRecord) enter(state string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.State = state
	if state == layerPulling && r.began.IsZero() {
		r.began = time.Now()
	}
	if state != layerPulling && !r.began.IsZero() && r.ended.IsZero() {
		r.ended = time.Now()
	}
}

// received adds bytes that came from a host, and the time that they took.
func (r *layerRecord) received(n int, took time.Duration) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.DoneBytes += int64(n)
	r.now.Network += took
	r.meter.add(time.Now(), r.now.DoneBytes)
}

// restart forgets the bytes: the layer is fetched anew.
func (r *layerRecord) restart() {
	r.change(func(l *LayerProgress) { l.DoneBytes = 0 })
}

func (r *layerRecord) progress() LayerProgress {
	if r == nil {
		return LayerProgress{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.now
	if out.State == layerPulling {
		out.Rate = r.meter.rate(time.Now())
	}
	if r.began.IsZero() {
		return out
	}
	waited := r.waited
	if !r.reading.IsZero() {
		waited += time.Since(r.reading)
	}
	end := r.ended
	if end.IsZero() {
		end = time.Now()
	}
	out.Disk = max(end.Sub(r.began)-waited, 0)
	out.CPU = max(waited-out.Network, 0)
	return out
}

// unpacking measures, in what is read through it, how long the unpacker waits for bytes.
func (r *layerRecord) unpacking(src layer.Chunks) layer.Chunks {
	if r == nil {
		return src
	}
	return &timedReader{src, r}
}

type timedReader struct {
	layer.Chunks
	r *layerRecord
}

// Chunk implements layer.Chunks.
func (t *timedReader) Chunk() ([]byte, error) {
	defer t.wait()()
	return t.Chunks.Chunk()
}

// Read implements io.Reader.
func (t *timedReader) Read(p []byte) (int, error) {
	defer t.wait()()
	return t.Chunks.Read(p)
}

// wait measures until the function that it returns is called.
func (t *timedReader) wait() (end func()) {
	began := time.Now()
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	t.r.reading = began
	return func() {
		t.r.mu.Lock()
		defer t.r.mu.Unlock()
		t.r.waited += time.Since(began)
		t.r.reading = time.Time{}
	}
}

// meter keeps a few samples of a growing number to tell its present speed.
type meter struct {
	at  [8]time.Time
	n   [8]int64
	pos int
}

const meterStep = 500 * time.Millisecond

func (m *meter) add(now time.Time, n int64) {
	if !m.at[m.pos].IsZero() && now.Sub(m.at[m.pos]) < meterStep {
		return
	}
	m.pos = (m.pos + 1) % len(m.at)
	m.at[m.pos], m.n[m.pos] = now, n
}

// rate is per second, between the oldest sample and the newest; it falls when nothing
// was added for a while.
func (m *meter) rate(now time.Time) int64 {
	oldest := -1
	for i := 1; i <= len(m.at) && oldest < 0; i++ {
		if j := (m.pos + i) % len(m.at); !m.at[j].IsZero() && j != m.pos {
			oldest = j
		}
	}
	if oldest < 0 {
		return 0
	}
	span := m.at[m.pos].Sub(m.at[oldest])
	if idle := now.Sub(m.at[m.pos]); idle > 2*meterStep {
		span += idle
	}
	return int64(float64(m.n[m.pos]-m.n[oldest]) / max(span.Seconds(), 0.001))
}

func (p *pull) progress() PullProgress {
	p.mu.Lock()
	out := PullProgress{Reference: p.ref, Image: p.named, Stage: p.stage, Began: p.began, StageAt: p.stageAt, Last: p.problem}
	records, shared := slices.Clone(p.records), slices.Clone(p.shared)
	p.mu.Unlock()
	var ready int
	var network, cpu, disk time.Duration
	for i, r := range records {
		l := r.progress()
		l.Shared = shared[i]
		out.Layers = append(out.Layers, l)
		if l.State == layerDone || l.State == layerPresent {
			ready++
		}
		if l.State != layerPresent {
			out.TotalBytes += l.TotalBytes
			out.DoneBytes += l.DoneBytes
		}
		out.Rate += l.Rate
		network, cpu, disk = network+l.Network, cpu+l.CPU, disk+l.Disk
	}
	switch most := max(network, cpu, disk); {
	case most == 0:
	case most == network:
		out.Limit = "network"
	case most == cpu:
		out.Limit = "cpu"
	default:
		out.Limit = "disk"
	}
	if out.Stage == stageLayers {
		out.Stage = fmt.Sprintf("%s %d/%d", stageLayers, ready, len(records))
	}
	return out
}

// where is the progress in words, for an error.
func (p PullProgress) where() string {
	text := fmt.Sprintf("at %s for %s, %s in all", p.Stage,
		time.Since(p.StageAt).Round(time.Millisecond), time.Since(p.Began).Round(time.Millisecond))
	if p.TotalBytes > 0 {
		text += fmt.Sprintf(", %d of %d bytes, %d bytes/s", p.DoneBytes, p.TotalBytes, p.Rate)
	}
	if p.Limit != "" {
		text += ", mostly waiting for " + p.Limit
	}
	if p.Last != "" {
		text += ", last problem: " + p.Last
	}
	return text
}

// Pulls returns what pulls are running, the oldest first.
func (s *Service) Pulls() []PullProgress {
	s.mu.Lock()
	running := slices.Collect(maps.Values(s.pulls))
	waiters := map[*pull]int{}
	for _, p := range running {
		waiters[p] = p.waiters
	}
	s.mu.Unlock()
	out := make([]PullProgress, 0, len(running))
	for _, p := range running {
		st := p.progress()
		st.Waiters = waiters[p]
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b PullProgress) int { return a.Began.Compare(b.Began) })
	return out
}
