package wire

import (
	"math"
	"time"
)

// Each message has two methods. Append adds it to b as one frame of the call;
// the error is ErrSize. Decode sets the fields that are in f and leaves the
// others; the error is ErrFrame.

// Hello opens a connection, in both directions.
type Hello struct {
	Version, Min uint64
	ShimPID      int    // from the shim only
	ID           string // from the shim only; "" before Launch
}

// Kill asks to send a signal.
type Kill struct {
	Signal int  // 1 … 64
	All    bool // to every process of the container, not only to its init
}

// Exec asks to run a process whose OCI description came in ExecData before.
type Exec struct {
	Timeout   time.Duration // 0 for none
	Drain     time.Duration // for output after its end; 0 is 2 s
	MaxOutput int64         // bytes for each of stdout and stderr; 0 for none at all

	// Stream runs the process on descriptors that came along: its stdin,
	// stdout and stderr. The three fields above must be zero; the answer comes
	// when the process has ended, whoever holds its output open.
	Stream bool
	// Console, with Stream, is the socket on which the runtime passes the pty
	// of a process that has a terminal. Then no descriptors come along.
	Console string
}

// ExecOutput is a piece of what an exec wrote.
type ExecOutput struct {
	Stream int // 1 stdout, 2 stderr
	Data   []byte
}

// ExecResult ends an exec.
type ExecResult struct {
	ExitCode                         int
	StdoutTruncated, StderrTruncated bool
	TimedOut                         bool
	Native                           bool // started without the OCI runtime
}

// Stdin carries input for the container's process.
type Stdin struct {
	Data []byte
	EOF  bool // no more will follow
}

// Tags of the payload of ExecData: a piece of the OCI description of a process, or
// of its ExecImage.
const (
	TagData  = 1
	TagImage = 2
)

// A setter stores one field; it is given tags in the order they came.
type setter func(tag byte, p []byte) error

func (f Fields) each(set setter) error {
	for {
		tag, p, err := f.Next()
		if err != nil {
			return err
		}
		if tag == 0 {
			return nil
		}
		if err := set(tag, p); err != nil {
			return err
		}
	}
}

func setUint(v *uint64, p []byte) (err error) { *v, err = Uint(p); return err }

func setUint32(v *uint32, p []byte) error {
	n, err := Uint(p)
	*v = uint32(min(n, math.MaxUint32))
	return err
}

func setInt(v *int, p []byte) error {
	n, err := Int(p)
	*v = clampInt(n)
	return err
}

func setInt64(v *int64, p []byte) (err error) { *v, err = Int(p); return err }

func setBool(v *bool, p []byte) error {
	n, err := Uint(p)
	*v = n != 0
	return err
}

func setString(v *string, p []byte) error { *v = string(p); return nil }

func addString(v *[]string, p []byte) error { *v = append(*v, string(p)); return nil }

func setDuration(v *time.Duration, p []byte) error {
	n, err := Int(p)
	*v = time.Duration(n)
	return err
}

func (h Hello) Append(b *Builder, call uint32) error {
	b.Begin(TypeHello, call)
	b.Uint(1, h.Version)
	b.Uint(2, h.Min)
	b.Int(3, int64(h.ShimPID))
	b.String(4, h.ID)
	return b.End()
}

func (h *Hello) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setUint(&h.Version, p)
		case 2:
			return setUint(&h.Min, p)
		case 3:
			return setInt(&h.ShimPID, p)
		case 4:
			return setString(&h.ID, p)
		}
		return nil
	})
}

func (l Launch) Append(b *Builder, call uint32) error {
	b.Begin(TypeLaunch, call)
	b.String(1, l.ID)
	b.String(2, l.Bundle)
	b.String(3, l.Runtime)
	b.String(4, l.RuntimeRoot)
	b.Strings(5, l.RuntimeArgs)
	b.Bool(6, l.SystemdCgroup)
	b.String(7, l.Socket)
	b.String(8, l.ExitFile)
	b.String(9, l.LogPath)
	b.Bool(10, l.Terminal)
	b.Bool(11, l.Stdin)
	b.Bool(12, l.StdinOnce)
	for _, m := range l.Mounts {
		var in Builder
		in.String(1, m.Type)
		in.String(2, m.Source)
		in.Strings(3, m.Options)
		in.String(4, m.Dir)
		in.String(5, m.Target)
		in.String(6, m.IDMap)
		b.Bytes(13, in.Buf)
	}
	b.String(14, l.Rootfs)
	b.String(15, l.OOMFile)
	b.Strings(16, l.CgroupKill)
	b.Bool(17, l.PrivatePID)
	b.Int(18, int64(l.MaxLogLine))
	b.Int(19, int64(l.DrainTimeout))
	b.Int(20, int64(l.CreateTimeout))
	b.Bool(40, l.KeepFilter)
	if l.OOMScoreAdj != nil {
		// One more than twice the value: zero, too, must be said.
		b.Int(21, int64(*l.OOMScoreAdj)*2+1)
	}
	b.String(22, l.UserNS)
	b.Uint(23, uint64(l.RootUID))
	b.Uint(24, uint64(l.RootGID))
	return b.End()
}

func (l *Launch) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setString(&l.ID, p)
		case 2:
			return setString(&l.Bundle, p)
		case 3:
			return setString(&l.Runtime, p)
		case 4:
			return setString(&l.RuntimeRoot, p)
		case 5:
			return addString(&l.RuntimeArgs, p)
		case 6:
			return setBool(&l.SystemdCgroup, p)
		case 7:
			return setString(&l.Socket, p)
		case 8:
			return setString(&l.ExitFile, p)
		case 9:
			return setString(&l.LogPath, p)
		case 10:
			return setBool(&l.Terminal, p)
		case 11:
			return setBool(&l.Stdin, p)
		case 12:
			return setBool(&l.StdinOnce, p)
		case 13:
			var m Mount
			err := m.decode(p)
			l.Mounts = append(l.Mounts, m)
			return err
		}
		return l.decodeRest(tag, p)
	})
}

func (l *Launch) decodeRest(tag byte, p []byte) error {
	switch tag {
	case 14:
		return setString(&l.Rootfs, p)
	case 15:
		return setString(&l.OOMFile, p)
	case 16:
		return addString(&l.CgroupKill, p)
	case 17:
		return setBool(&l.PrivatePID, p)
	case 18:
		return setInt(&l.MaxLogLine, p)
	case 19:
		return setDuration(&l.DrainTimeout, p)
	case 20:
		return setDuration(&l.CreateTimeout, p)
	case 40:
		return setBool(&l.KeepFilter, p)
	case 21:
		n, err := Int(p)
		v := clampInt((n - 1) / 2)
		l.OOMScoreAdj = &v
		return err
	case 22:
		return setString(&l.UserNS, p)
	case 23:
		return setUint32(&l.RootUID, p)
	case 24:
		return setUint32(&l.RootGID, p)
	}
	return nil
}

func (m *Mount) decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setString(&m.Type, p)
		case 2:
			return setString(&m.Source, p)
		case 3:
			return addString(&m.Options, p)
		case 4:
			return setString(&m.Dir, p)
		case 5:
			return setString(&m.Target, p)
		case 6:
			return setString(&m.IDMap, p)
		}
		return nil
	})
}

func (l Launched) Append(b *Builder, call uint32) error {
	b.Begin(TypeLaunched, call)
	b.Int(1, int64(l.ShimPID))
	b.Int(2, int64(l.Pid))
	return b.End()
}

func (l *Launched) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&l.ShimPID, p)
		case 2:
			return setInt(&l.Pid, p)
		}
		return nil
	})
}

func (e Exit) fields(b *Builder) {
	b.Int(1, int64(e.Code))
	b.Int(2, int64(e.Signal))
	b.Bool(3, e.OOMKilled)
	if !e.At.IsZero() { // whose UnixNano is not defined
		b.Int(4, e.At.UnixNano())
	}
	b.String(5, e.Reason)
}

func (e Exit) Append(b *Builder, call uint32) error {
	b.Begin(TypeExit, call)
	e.fields(b)
	return b.End()
}

func (e *Exit) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&e.Code, p)
		case 2:
			return setInt(&e.Signal, p)
		case 3:
			return setBool(&e.OOMKilled, p)
		case 4:
			n, err := Int(p)
			e.At = time.Unix(0, n)
			return err
		case 5:
			return setString(&e.Reason, p)
		}
		return nil
	})
}

func (s State) Append(b *Builder, call uint32) error {
	b.Begin(TypeStateIs, call)
	b.Int(1, int64(s.Pid))
	b.Int(2, int64(s.ShimPID))
	b.String(3, s.Status)
	if s.Exit != nil {
		var in Builder
		s.Exit.fields(&in)
		b.Bytes(4, in.Buf)
	}
	return b.End()
}

func (s *State) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&s.Pid, p)
		case 2:
			return setInt(&s.ShimPID, p)
		case 3:
			return setString(&s.Status, p)
		case 4:
			s.Exit = &Exit{}
			return s.Exit.Decode(p)
		}
		return nil
	})
}

func (k Kill) Append(b *Builder, call uint32) error {
	b.Begin(TypeKill, call)
	b.Int(1, int64(k.Signal))
	b.Bool(2, k.All)
	return b.End()
}

func (k *Kill) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&k.Signal, p)
		case 2:
			return setBool(&k.All, p)
		}
		return nil
	})
}

func (e Exec) Append(b *Builder, call uint32) error {
	b.Begin(TypeExec, call)
	b.Int(1, int64(e.Timeout))
	b.Int(2, int64(e.Drain))
	b.Int(3, e.MaxOutput)
	b.Bool(4, e.Stream)
	b.String(5, e.Console)
	return b.End()
}

func (e *Exec) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setDuration(&e.Timeout, p)
		case 2:
			return setDuration(&e.Drain, p)
		case 3:
			return setInt64(&e.MaxOutput, p)
		case 4:
			return setBool(&e.Stream, p)
		case 5:
			return setString(&e.Console, p)
		}
		return nil
	})
}

func (o ExecOutput) Append(b *Builder, call uint32) error {
	b.Begin(TypeExecOutput, call)
	b.Int(1, int64(o.Stream))
	b.Bytes(2, o.Data)
	return b.End()
}

// Decode sets Data to a part of f.
func (o *ExecOutput) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&o.Stream, p)
		case 2:
			o.Data = p
		}
		return nil
	})
}

func (r ExecResult) Append(b *Builder, call uint32) error {
	b.Begin(TypeExecResult, call)
	b.Int(1, int64(r.ExitCode))
	b.Bool(2, r.StdoutTruncated)
	b.Bool(3, r.StderrTruncated)
	b.Bool(4, r.TimedOut)
	b.Bool(5, r.Native)
	return b.End()
}

func (r *ExecResult) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setInt(&r.ExitCode, p)
		case 2:
			return setBool(&r.StdoutTruncated, p)
		case 3:
			return setBool(&r.StderrTruncated, p)
		case 4:
			return setBool(&r.TimedOut, p)
		case 5:
			return setBool(&r.Native, p)
		}
		return nil
	})
}

func (s Stdin) Append(b *Builder, call uint32) error {
	b.Begin(TypeStdin, call)
	b.Bytes(1, s.Data)
	b.Bool(2, s.EOF)
	return b.End()
}

// Decode sets Data to a part of f.
func (s *Stdin) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			s.Data = p
		case 2:
			return setBool(&s.EOF, p)
		}
		return nil
	})
}

func (e Error) Append(b *Builder, call uint32) error {
	b.Begin(TypeError, call)
	b.Uint(1, uint64(e.Code))
	b.String(2, e.Step)
	b.String(3, e.Message)
	return b.End()
}

func (e *Error) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setUint((*uint64)(&e.Code), p)
		case 2:
			return setString(&e.Step, p)
		case 3:
			return setString(&e.Message, p)
		}
		return nil
	})
}
