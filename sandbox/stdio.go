package sandbox

import (
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stdio are the pipes of a command, or its pty.
type stdio struct {
	in     *os.File // nil when there is no input
	outs   []*outStream
	theirs [3]*os.File // the command's ends, for the shim client to close
}

// An outStream is read by this daemon and written to a client.
type outStream struct {
	f  *os.File
	to io.WriteCloser
}

// openStdio makes a pipe for each stream that is wanted, which belongs to the root
// of the user namespace; the rest is /dev/null.
func openStdio(st Streams, u *userNS) (p *stdio, err error) {
	p = &stdio{}
	defer func() {
		if err != nil {
			p.close()
			for _, f := range p.theirs {
				if f != nil {
					f.Close()
				}
			}
		}
	}()
	if st.In == nil {
		p.theirs[0], err = os.Open(os.DevNull)
	} else {
		p.theirs[0], p.in, err = pipeTo()
		err = ownPipe(p.in, u, err)
	}
	if err != nil {
		return p, err
	}
	for i, to := range []io.WriteCloser{st.Out, st.Err} {
		if to == nil {
			p.theirs[i+1], err = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		} else {
			var r *os.File
			if r, p.theirs[i+1], err = pipeFrom(); err == nil {
				p.outs = append(p.outs, &outStream{r, to})
			}
			err = ownPipe(p.theirs[i+1], u, err)
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// ownPipe gives a pipe that was made without an error to the root of u.
func ownPipe(f *os.File, u *userNS, err error) error {
	if uid, gid := u.root(); err == nil && uid != 0 {
		err = f.Chown(int(uid), int(gid))
	}
	return err
}

// close ends all of this daemon's ends. It may be called again.
func (p *stdio) close() {
	if p.in != nil {
		p.in.Close()
	}
	for _, o := range p.outs {
		o.f.Close()
	}
}

// pipeTo returns a pipe to write to, with a reader's end that blocks, as
// commands expect it.
func pipeTo() (theirs, ours *os.File, err error) { return pipe(1) }

// pipeFrom returns a pipe to read from, with a writer's end that blocks.
func pipeFrom() (ours, theirs *os.File, err error) { return pipe(0) }

func pipe(ours int) (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	err = unix.SetNonblock(p[ours], true) // before NewFile, which then polls
	r, w = os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe")
	if err != nil {
		r.Close()
		w.Close()
		return nil, nil, err
	}
	return r, w, nil
}

// copy writes what comes until the end, or what finish makes the end.
func (o *outStream) copy() {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	defer o.to.Close()
	for {
		n, err := o.f.Read(*buf)
		if n > 0 {
			if _, err := o.to.Write((*buf)[:n]); err != nil {
				o.f.Close() // the command is to notice
				return
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.rest(*buf)
			return
		}
		if err != nil { // a pty ends with EIO
			return
		}
	}
}

// finish ends a copy after a while, when the command has ended.
func (o *outStream) finish(after time.Duration) {
	_ = o.f.SetReadDeadline(time.Now().Add(after)) // an error means that it is closed
}

// rest writes what lies in the pipe now. All that the command wrote before its
// end is in that, however slow the client was; a child of it may go on writing,
// so it is limited to what a pipe holds.
func (o *outStream) rest(buf []byte) {
	if o.f.SetReadDeadline(time.Time{}) != nil {
		return
	}
	raw, err := o.f.SyscallConn()
	if err != nil {
		return
	}
	for left := len(buf); left > 0; {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf[:left])
			return true // do not wait
		})
		if err != nil || n <= 0 {
			return
		}
		if _, err := o.to.Write(buf[:n]); err != nil {
			return
		}
		left -= n
	}
}
