package shimd

import (
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/crilog"
	"github.com/berthd/berth/shim/wire"
)

// A logFile writes the CRI log. When the disk is full or broken it drops what
// it is given and counts that, as a container must not stop for its log, and
// leaves a note in the log once it can be written again.
type logFile struct {
	fd      int
	dropped int64 // bytes of records since the last one that was written
	why     error
	torn    bool // the file may end within a record
}

// openLog makes the file if there is none. A symbolic link is refused: the
// directory may belong to somebody else.
func openLog(path string) (*logFile, error) {
	fd, err := openLogFD(path)
	if err != nil {
		return nil, err
	}
	return &logFile{fd: fd}, nil
}

func openLogFD(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.EINVAL // a FIFO would hold the container up
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// reopenLog answers once the path is open. Chunks are written whole, so the
// change falls between two.
func (s *shim) reopenLog(p pending) *stepError {
	if s.log == nil {
		return fail(wire.CodeState, "", "container has no log")
	}
	fd, err := openLogFD(s.l.LogPath)
	if err != nil {
		return failErr(s.l.LogPath, err)
	}
	unix.Close(s.log.fd)
	s.log.fd, s.log.torn = fd, false
	p.ok()
	return nil
}

// chunk writes the records of p, many with each call.
func (l *logFile) chunk(st *stream, p []byte) {
	at := now()
	if p == nil {
		l.write(st.framer.Flush(outBuf[:0], at))
		return
	}
	for len(p) > 0 {
		out, n := st.framer.Append(outBuf[:0], p, at)
		p = p[n:]
		l.write(out)
	}
}

func (l *logFile) write(b []byte) {
	if len(b) == 0 {
		return
	}
	outHigh = max(outHigh, min(len(b), outSize))
	if l.dropped > 0 && !l.note() {
		l.dropped += int64(len(b))
		return
	}
	l.put(b)
}

// put writes b and counts what could not be written.
func (l *logFile) put(b []byte) bool {
	for len(b) > 0 {
		n, err := unix.Write(l.fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			l.dropped += int64(len(b))
			l.why = err
			return false
		}
		b = b[n:]
		l.torn = len(b) > 0
	}
	return true
}

// note says how much is missing, and returns whether that could be written.
func (l *logFile) note() bool {
	var b []byte
	if l.torn {
		b = append(b, '\n')
	}
	text := strconv.FormatInt(l.dropped, 10) + " bytes of log dropped: " + l.why.Error()
	b = crilog.AppendNote(b, text, now())
	before := l.dropped
	if !l.put(b) {
		l.dropped = before
		return false
	}
	l.dropped, l.why = 0, nil
	return true
}

func (l *logFile) close() {
	if l != nil && l.fd >= 0 {
		if l.dropped > 0 {
			l.note()
		}
		unix.Close(l.fd)
		l.fd = -1
	}
}
