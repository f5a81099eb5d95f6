#include "textflag.h"

// The kernel calls a handler by the C convention and restores every register
// afterwards, so that nothing has to be saved here. The return address is the
// restorer's.

// write(wakeFD, &wakeOne, 8)
TEXT ·onChild(SB),NOSPLIT|NOFRAME,$0-0
	MOVL	·wakeFD(SB), DI
	LEAQ	·wakeOne(SB), SI
	MOVL	$8, DX
	MOVL	$1, AX
	SYSCALL
	RET

TEXT ·onIgnored(SB),NOSPLIT|NOFRAME,$0-0
	RET

// rt_sigreturn()
TEXT ·onReturn(SB),NOSPLIT|NOFRAME,$0-0
	MOVL	$15, AX
	SYSCALL
	INT	$3

TEXT ·onChildPC(SB),NOSPLIT,$0-8
	LEAQ	·onChild(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

TEXT ·onIgnoredPC(SB),NOSPLIT,$0-8
	LEAQ	·onIgnored(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

TEXT ·onReturnPC(SB),NOSPLIT,$0-8
	LEAQ	·onReturn(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
