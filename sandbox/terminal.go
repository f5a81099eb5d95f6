package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// console is a socket on which an OCI runtime passes the pty of one command.
type console struct {
	path   string
	l      *net.UnixListener
	master chan *os.File // gets it, or is closed when it does not come
}

// consoleDir holds nothing between starts of the daemon.
func (s *Service) consoleDir() string { return filepath.Join(s.cfg.RunDir, "tty") }

func openConsole(dir string) (*console, error) {
	var name [8]byte
	rand.Read(name[:])
	c := &console{path: filepath.Join(dir, hex.EncodeToString(name[:])), master: make(chan *os.File, 1)}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	c.l = l
	go func() {
		defer close(c.master)
		if f, err := c.accept(); err == nil {
			c.master <- f
		}
	}()
	return c, nil
}

// close ends the wait for a pty and removes the socket.
func (c *console) close() { c.l.Close() }

func (c *console) accept() (*os.File, error) {
	conn, err := c.l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	text, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(8*4))
	_, n, _, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		return nil, err
	}
	return ptyIn(oob[:n])
}

// ptyIn takes the one descriptor out of a message.
func ptyIn(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) != 1 || unix.SetNonblock(fds[0], true) != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, errors.New("console socket: not one pty")
	}
	return os.NewFile(uintptr(fds[0]), "pty"), nil
}

func (s *Service) execTerminal(ctx context.Context, client *shim.Client, c *container, cmd []string, st Streams) (int, error) {
	size := waitSize(ctx, st.Resize)
	what, err := s.command(c, cmd, &size)
	if err != nil {
		return 0, err
	}
	con, err := openConsole(s.consoleDir())
	if err != nil {
		return 0, err
	}
	defer con.close()
	run := begin(ctx, func(ctx context.Context, started func()) (int, error) {
		return client.ExecStream(ctx, shim.StreamRequest{Process: what.process, Console: con.path}, started)
	})
	var tty *os.File
	select {
	case tty = <-con.master:
	case <-run.ended:
		if run.err != nil {
			return 0, run.err
		}
		tty = <-con.master // a very short command
	case <-ctx.Done():
		return run.hangUp(ctx)
	}
	if tty == nil {
		run.kill()
		<-run.ended
		return 0, errors.Join(errors.New("exec: no pty came from the OCI runtime"), run.err)
	}
	con.close()
	p := &stdio{in: tty}
	defer p.close()
	if st.Out != nil {
		p.outs = append(p.outs, &outStream{tty, st.Out})
	}
	if st.In != nil {
		go feed(tty, st.In, false)
	}
	go resizes(st.Resize, run.ended, func(s TermSize) { resizePTY(tty, s) })
	return run.follow(ctx, p)
}

// waitSize gives a client the time to say how large its terminal is.
func waitSize(ctx context.Context, sizes <-chan TermSize) TermSize {
	if sizes == nil {
		return TermSize{}
	}
	t := time.NewTimer(firstSize)
	defer t.Stop()
	select {
	case size := <-sizes:
		return size
	case <-t.C:
	case <-ctx.Done():
	}
	return TermSize{}
}

// resizes calls set for each size until the channel or the session ends.
func resizes(sizes <-chan TermSize, ended <-chan struct{}, set func(TermSize)) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			if size.Width > 0 && size.Height > 0 {
				set(size)
			}
		case <-ended:
			return
		}
	}
}

func resizePTY(tty *os.File, size TermSize) {
	if raw, err := tty.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { // fails when it has ended
			_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
		})
	}
}
