package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

const (
	// maxBehind is how much output may wait for the client of an Attach, for
	// each stream. If it does not take half of that within catchUp then, it is
	// cut off. catchUp is less than the shim waits for the pipe, so the
	// container is held up by clients only that read tens of MiB a second.
	maxBehind = 16 << 20
	catchUp   = 150 * time.Millisecond
	// attachPipe is the size that the pipe from the shim gets, if possible.
	attachPipe = 1 << 20
	// busyWait is the pause before input is offered to a shim again that is
	// busy with another client's.
	busyWait = 20 * time.Millisecond
)

// CheckAttach tells whether Attach would be possible now. tty must be the
// container's own setting, as the CRI demands it.
func (s *Service) CheckAttach(id string, stdin, tty bool) error {
	c, err := s.running(id)
	if err != nil {
		return err
	}
	if tty != c.config.GetTty() {
		return fmt.Errorf("%w: tty: %t, but it is %t in the configuration of container %s", ErrInvalid, tty, c.config.GetTty(), c.ID)
	}
	if stdin && !c.config.GetStdin() {
		return fmt.Errorf("%w: stdin: container %s was configured without", ErrState, c.ID)
	}
	return nil
}

// Attach connects a client to the streams of a running container: it gets what
// the container writes from now on, beside the log and other clients, and what
// it sends goes to the container's input. It returns when the container's
// output has ended, or the input if no output is wanted, or when ctx has ended.
//
// The container does not wait for a slow client: one that is maxBehind bytes
// behind and does not catch up gets ErrSlow. If the container was configured with stdin_once, the input ends
// for good with the first client that has it.
func (s *Service) Attach(ctx context.Context, id string, st Streams) error {
	if err := s.CheckAttach(id, st.In != nil, st.TTY); err != nil {
		return err
	}
	c, err := s.running(id)
	if err != nil {
		return err
	}
	client, err := s.client(ctx, c.ID)
	if err != nil {
		return fmt.Errorf("container %s: attach: %w", c.ID, err)
	}
	if err := attach(ctx, client, st); err != nil {
		return fmt.Errorf("container %s: attach: %w", c.ID, err)
	}
	return nil
}

func attach(ctx context.Context, client *shim.Client, st Streams) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	req := shim.AttachRequest{Stdin: st.In != nil}
	relays, err := openRelays(st, &req)
	if err != nil {
		return err
	}
	began, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- client.Attach(ctx, req, func() { close(began) }) }()
	select {
	case <-began:
	case err = <-ended:
		ended <- err // to be found again when it is no error
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		for _, r := range relays {
			r.f.Close()
		}
		return err
	}
	inputEnded := make(chan struct{})
	if st.In != nil {
		go func() {
			defer close(inputEnded)
			input(ctx, client, st.In)
		}()
	}
	go resizes(st.Resize, ctx.Done(), func(z TermSize) { _ = client.Resize(ctx, z.Width, z.Height) })
	if len(relays) == 0 {
		select {
		case err = <-ended:
		case <-inputEnded:
		case <-ctx.Done():
		}
		return lostIsEnd(err)
	}
	return relayAll(ctx, relays, ended)
}

// relayAll runs relays until they and the attachment have ended.
func relayAll(ctx context.Context, relays []*relay, ended <-chan error) error {
	slow := make(chan struct{}, len(relays))
	var writers sync.WaitGroup
	for _, r := range relays {
		go r.read(slow)
		writers.Go(r.write)
	}
	written := make(chan struct{})
	go func() {
		writers.Wait()
		close(written)
	}()
	defer func() {
		for _, r := range relays {
			r.f.Close()
			r.end()
		}
	}()
	select {
	case <-written: // the container's output has ended, or the client has gone
	case <-slow:
		return fmt.Errorf("%w: %d bytes of output wait for it", ErrSlow, maxBehind)
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-ended:
		return lostIsEnd(err)
	case <-time.After(hangupGrace):
		return nil
	}
}

// lostIsEnd: a shim ends soon after its container.
func lostIsEnd(err error) error {
	switch {
	case errors.Is(err, shim.ErrGone):
		return nil
	case errors.Is(err, shim.ErrSlow):
		return fmt.Errorf("%w: %w", ErrSlow, err)
	}
	return err
}

// input passes on what a client sends. The end of it is the end of the
// container's input if that was configured for one client; the shim knows.
func input(ctx context.Context, client *shim.Client, in io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 || err == io.EOF {
			if writeInput(ctx, client, buf[:n], err == io.EOF) != nil {
				// Not taken any more. It is read on, as a connection
				// carries more than this.
				io.Copy(io.Discard, in)
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// writeInput waits for its turn while another client's input is under way.
func writeInput(ctx context.Context, client *shim.Client, p []byte, eof bool) error {
	for {
		err := client.WriteStdin(ctx, p, eof)
		if !errors.Is(err, shim.ErrBusy) {
			return err
		}
		select {
		case <-time.After(busyWait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A relay takes output from the shim's pipe at once, and keeps what the client
// does not take as fast.
type relay struct {
	f  *os.File
	to io.WriteCloser

	mu     sync.Mutex
	more   *sync.Cond
	queue  [][]byte
	size   int
	closed bool
	room   chan struct{} // written to when not more than half of maxBehind waits
}

func newRelay(f *os.File, to io.WriteCloser) *relay {
	r := &relay{f: f, to: to, room: make(chan struct{}, 1)}
	r.more = sync.NewCond(&r.mu)
	return r
}

func openRelays(st Streams, req *shim.AttachRequest) ([]*relay, error) {
	var relays []*relay
	add := func(to io.WriteCloser, theirs **os.File) error {
		if to == nil {
			return nil
		}
		r, w, err := pipeFrom()
		if err != nil {
			return err
		}
		// Without the privilege for that it stays as it is.
		_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, attachPipe)
		relays, *theirs = append(relays, newRelay(r, to)), w
		return nil
	}
	err := errors.Join(add(st.Out, &req.Stdout), add(st.Err, &req.Stderr))
	if err != nil {
		for _, f := range []*os.File{req.Stdout, req.Stderr} {
			if f != nil {
				f.Close()
			}
		}
		for _, r := range relays {
			r.f.Close()
		}
	}
	return relays, err
}

// read takes what comes until its end, or until too much of it waits.
func (r *relay) read(slow chan<- struct{}) {
	defer r.end()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := r.f.Read(*buf)
		if n > 0 && !r.push(append([]byte(nil), (*buf)[:n]...)) {
			slow <- struct{}{}
			return
		}
		if err != nil {
			return
		}
	}
}

// push queues p, or returns false when the client does not catch up.
func (r *relay) push(p []byte) bool {
	if r.waiting()+len(p) > maxBehind && !r.caughtUp() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue, r.size = append(r.queue, p), r.size+len(p)
	r.more.Signal()
	return true
}

func (r *relay) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.size
}

// caughtUp gives the client a moment.
func (r *relay) caughtUp() bool {
	t := time.NewTimer(catchUp)
	defer t.Stop()
	for r.waiting() > maxBehind/2 {
		select {
		case <-r.room: // perhaps of long ago
		case <-t.C:
			return false
		}
	}
	return true
}

// end makes what is queued the last.
func (r *relay) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.more.Signal()
}

func (r *relay) pop() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.queue) == 0 && !r.closed {
		r.more.Wait()
	}
	if len(r.queue) == 0 {
		return nil
	}
	p := r.queue[0]
	r.queue[0] = nil
	r.queue = r.queue[1:]
	return p
}

// write sends what read took, until its end.
func (r *relay) write() {
	defer r.to.Close()
	for {
		p := r.pop()
		if p == nil {
			return
		}
		_, err := r.to.Write(p)
		r.mu.Lock()
		r.size -= len(p)
		room := r.size <= maxBehind/2
		r.mu.Unlock()
		if room {
			select {
			case r.room <- struct{}{}:
			default:
			}
		}
		if err != nil {
			r.f.Close() // nobody is there for it
			return
		}
	}
}
